"""What every language model family must pass: logits and answers from the fork cache are the model's own."""

import torch

import stars_kernels
from stars_kernels.hf.cache import open_cache
from stars_kernels.hf.cache.prefill import packed_chunks
from stars_kernels.hf.view.copying import view_of
from stars_kernels.hf.view.layout import text_config
from tests.sequential import sequential_decode
from tests.tiny import tiny_reward_model

PROMPTS = [list(range(50, 61)), [1, 2, 3, 4, 5], [40, 7, 8, 9, 10, 11, 12, 200]]
ROWS = [2, 0, 0, 1, 2, 1]
"""The prompt of each row."""


def check_logits(model, tolerance=1e-6, steps_only=False):
    """The largest difference of logits from the model's own forward of one row at a time, which must be <= tolerance.

    It is relative to the largest logit. Float64 gives 1e-15 where the model's own attention or norm is not float32.

    Rows are forked from ragged prompts, fed three tokens one by one, then 6 at once; rolled back and fed 4 at once;
    committed, and forked again. What was never written is NaN. steps_only: no forward of several tokens behind a state.
    """
    view, worst = view_of(model), 0.0
    generator = torch.Generator().manual_seed(0)
    vocabulary = text_config(model).vocab_size
    tokens = torch.randint(0, min(250, vocabulary), (len(ROWS), 9), generator=generator)
    prompts = [[t % vocabulary for t in prompt] for prompt in PROMPTS]
    with torch.no_grad():
        cache = open_cache(view, [len(p) + 12 for p in prompts], 9)
        own = [model(input_ids=torch.tensor([prompts[p] + tokens[r].tolist()])).logits[0] for r, p in enumerate(ROWS)]

        def compare(logits, row, start):
            nonlocal worst
            expected = own[row][start : start + len(logits)]
            assert logits.shape == expected.shape
            assert not logits.isnan().any(), "read what was never written"
            worst = max(worst, ((logits - expected).abs().max() / expected.abs().max().clamp(min=1)).item())

        for group in cache.groups:
            group.arena.fill_(torch.nan)
        for chunk in packed_chunks(dict(enumerate(prompts)), cache):
            with cache.prefill(chunk.slots, chunk.counts) as inputs:
                logits = view(input_ids=torch.tensor([chunk.ids]), **inputs).logits[0]
            for p, part in zip(chunk.slots, logits.split(chunk.counts), strict=True):
                compare(part, ROWS.index(p), 0)

        def feed(rows, start, stop):
            with cache.extend(stop - start) as inputs:
                logits = view(input_ids=tokens[rows, start:stop], **inputs).logits
            for row, part in zip(rows, logits, strict=True):
                compare(part, row, len(prompts[ROWS[row]]) + start)

        def feed_steps(rows, start, stop):
            for step in range(start, stop):
                feed(rows, step, step + 1)

        at_once = feed_steps if steps_only else feed
        rows, slot = list(range(len(ROWS))), torch.tensor(ROWS)
        cache.fork(slot)
        for group in cache.groups:
            group.suffix.fill_(torch.nan)
        feed_steps(rows, 0, 3)
        at_once(rows, 3, 9)
        again = 0 if cache.states is not None else 2
        cache.rollback(again)
        at_once(rows, again, again + 4)
        # One row of each prompt is the best so far, then its fallback; the row of the last prompt is accepted.
        chosen, held = torch.tensor([1, 3, 4]), torch.tensor([again + 4] * 3)
        advance = torch.tensor([False, False, True])
        cache.commit(torch.arange(3), chosen, held, advance)()
        cache.fork(slot)
        cache.commit(torch.arange(2), torch.tensor([-1, -1]), held[:2], ~advance[:2])()
        cache.fork(torch.arange(3))
        feed(chosen.tolist(), again + 4, again + 5)
        cache.rollback()
        at_once(chosen.tolist(), again + 4, again + 7)
    assert worst <= tolerance, f"{type(model).__name__}: logits differ by {worst}, expected <= {tolerance}"
    return worst


def check_decode(model, reward=None, prompts=PROMPTS[1:], widths=(1, 3), **changes):
    """`stars_kernels.decode` against the sequential loop: the same tokens and attempts for each width.

    reward: what decode takes as its reward model; None = a tiny Llama with the model's vocabulary.
    """
    if reward is None:
        reward = tiny_reward_model(vocab_size=text_config(model).vocab_size)
    settings = dict(seed=3, max_new_tokens=10, eos_token_id=(3, 77, 130))
    if "rule" not in changes:
        settings |= dict(reward_threshold=2.0, beta=1.0, segment_size=4, max_attempts=4)
    config = stars_kernels.StarsConfig(**{**settings, **changes})
    with torch.no_grad():
        truth = [sequential_decode(model, reward, p, i, config, config.eos_token_id) for i, p in enumerate(prompts)]
    for width in widths:
        outputs = stars_kernels.decode(
            model, reward, prompts, request_ids=list(range(len(prompts))), config=config, width=width
        )
        for output, (tokens, attempts) in zip(outputs, truth, strict=True):
            assert output.token_ids == tokens, f"{type(model).__name__}, width {width}"
            assert [segment.attempts for segment in output.segments] == attempts
    return outputs
