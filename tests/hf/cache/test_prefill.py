"""Prompts are read many at a time, with one attention call a layer, and each as if it were read alone."""

from unittest.mock import patch

import pytest
import torch

import stars_kernels
from stars_kernels import ops
from stars_kernels.hf.cache import open_cache
from stars_kernels.hf.cache.prefill import PREFILL_PIECES, PREFILL_TOKENS, packed_chunks
from stars_kernels.hf.cache.storage import PREFILL_ROW, Packed
from stars_kernels.hf.proposing.proposer import ModelProposer
from stars_kernels.hf.view.copying import view_of
from stars_kernels.hf.view.rewrites import pack
from tests.hf import bits_check, families
from tests.hf.proposing.test_segment_waits import Watch
from tests.runs import admit
from tests.tiny import tiny_language_model, tiny_reward_model

CPU = torch.device("cpu")
LENGTHS = [3, 64, 1, 65, 200, 128, 31]


def prompts_of(lengths):
    return [[(7 * p + i) % 250 for i in range(n)] for p, n in enumerate(lengths)]


def capacity(lengths):
    return [n + 4 for n in lengths]


@pytest.mark.parametrize("lengths", [[5], [3, 4, 5, 6], LENGTHS], ids=str)
@torch.inference_mode()
def test_one_attention_call_a_layer(lengths):
    proposer = ModelProposer(view_of(tiny_language_model(max_position_embeddings=512)))
    with Watch() as watch:
        admit(proposer, prompts_of(lengths), 4, 2)
    assert watch.seen.count("fork_attention") == 2


@torch.no_grad()
def test_logits_are_the_models_own_whatever_is_read_beside():
    """float64; also behind a prefix that is there already, of a length that is no multiple of a row."""
    lm = tiny_language_model(max_position_embeddings=512)
    view, prompts = view_of(lm), prompts_of(LENGTHS)
    cache = open_cache(view, [len(p) for p in prompts], 2)
    cache.groups[0].arena.fill_(torch.nan)
    cuts = [len(p) // 3 for p in prompts]
    found = [torch.empty(0, 260, dtype=torch.float64) for _ in prompts]
    cut = list(zip(prompts, cuts, strict=True))
    for pieces in ([p[:n] for p, n in cut], [p[n:] for p, n in cut]):
        for chunk in packed_chunks(dict(enumerate(pieces)), cache):
            with cache.prefill(chunk.slots, chunk.counts) as inputs:
                logits = view(input_ids=torch.tensor([chunk.ids]), **inputs).logits[0]
            for p, new in zip(chunk.slots, logits.split(chunk.counts), strict=True):
                found[p] = torch.cat([found[p], new])
    assert cache.lengths.tolist() == LENGTHS
    for prompt, logits in zip(prompts, found, strict=True):
        torch.testing.assert_close(logits, lm(torch.tensor([prompt])).logits[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"window": 50}, {"softcap": 3.0}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rows_of_a_prompt_are_its_one_row(dtype, options):
    """Attention cut in rows is that of the whole prompt: with the compiled op, to the bit."""
    torch.manual_seed(0)
    if "sinks" in options:
        options = {"sinks": torch.randn(6).to(dtype)}
    starts = [0, 64, 0, 131, 30, 0, 190]
    offsets = [sum(starts[:p]) + sum(LENGTHS[:p]) for p in range(len(LENGTHS))]
    arena = torch.randn(2, sum(starts) + sum(LENGTHS), 2, 8).to(dtype)
    total = sum(LENGTHS)
    query, key, value = (torch.randn(total, heads, 8).to(dtype) for heads in (6, 2, 2))
    plan = Packed.of(starts, LENGTHS, offsets, CPU)
    written = arena.clone()
    written[0, plan.where], written[1, plan.where] = key, value
    rows = [plan.in_rows(tokens) for tokens in (query, key, value)]
    found = plan.end_to_end(
        ops.fork_attention(
            *rows, plan.counts, plan.counts, *written, plan.offsets, plan.lengths, plan.rows, scale=0.3, **options
        )
    )
    begin = 0
    for start, count, offset in zip(starts, LENGTHS, offsets, strict=True):
        new, one = slice(begin, begin + count), torch.tensor([count])
        alone = ops.fork_attention(
            query[None, new], key[None, new], value[None, new], one, one, *arena, torch.tensor([offset]),
            torch.tensor([start]), torch.tensor([0]), scale=0.3, **options,
        )[0]  # fmt: skip
        if bits_check.compiled():
            assert torch.equal(found[new], alone)
        else:
            torch.testing.assert_close(found[new], alone)
        begin += count


@pytest.mark.skipif(not bits_check.compiled(), reason="no compiled extension: torch's products follow the batch")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen2", "mistral", "gpt2", "phi3"])
def test_bits_do_not_depend_on_the_prompts_beside(family):
    """Prefix lengths on both sides of a row, alone, together, and in another order."""
    torch.manual_seed(0)
    lm = families.tiny(family).float()
    rm = tiny_reward_model(torch.float32, max_position_embeddings=512, vocab_size=lm.config.vocab_size)
    ids = range(len(LENGTHS))
    limit = getattr(lm.config, "max_position_embeddings", 512) - 4
    prompts = [prompt[:limit] for prompt in prompts_of(LENGTHS)]
    settings = dict(seed=0, reward_threshold=3.0, beta=1.0, max_new_tokens=3, segment_size=2, max_attempts=2, width=2)

    def answers(order, batch_size):
        outputs = stars_kernels.decode(
            lm, rm, [prompts[i] for i in order], request_ids=order, batch_size=batch_size, eos_token_id=(), **settings
        )
        found = [(o.token_ids, o.prompt_reward, [s.rewards for s in o.segments]) for o in outputs]
        return dict(zip(order, found, strict=True))

    alone = answers(list(ids), 1)
    assert answers(list(ids), 8) == alone
    assert answers([*reversed(ids)], 3) == alone


WAYS = {
    "pieces": [(1, False), (7, False), (63, False), (30, False), (49, False)],
    "token by token": [(1, True)] * 150,
    "segments": [(13, True)] * 11 + [(7, True)],
    "a prompt, then segments": [(70, False)] + [(16, True)] * 5,
    "segments between prompts": [(5, True), (100, False), (16, True), (29, False)],
}
"""Of reading 150 tokens: how many at a time, and whether as suffixes of forked rows."""


@pytest.mark.skipif(not bits_check.compiled(), reason="no compiled extension: torch's products follow the batch")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen2", "mistral", "gpt2", "phi3"])
@torch.inference_mode()
def test_bits_do_not_depend_on_how_tokens_are_read(family, way):
    """Logits of every token, and keys and values, are those of one prefill."""
    with patch.dict(families.GENERIC, bits_check.UNEVEN):
        view = view_of(families.tiny(family).float())
    assert pack(view)
    ids, one = torch.tensor(prompts_of([150])), torch.tensor([1])

    def read(way):
        cache = open_cache(view, [150], 16)
        logits = []
        for tokens, (count, forked) in zip(ids.split([n for n, _ in way], 1), way, strict=True):
            if not forked:
                with cache.prefill([0], [count]) as inputs:
                    logits.append(view(input_ids=tokens, **inputs).logits[0])
                continue
            cache.fork(torch.zeros(3, dtype=torch.int64))
            rows = torch.cat([tokens.flip(1), tokens, tokens + 1])
            for part in rows.split(5, 1):
                with cache.extend(part.shape[1]) as inputs:
                    logits.append(view(input_ids=part, **inputs).logits[1])
            cache.commit(slot=one - 1, row=one, count=one * count, advance=one > 0)()
        return torch.cat(logits), *(group.arena for group in cache.groups)

    for found, expected in zip(read(way), read([(150, False)]), strict=True):
        assert torch.equal(found, expected)


def test_padding_is_bounded():
    """Of many short prompts, no more are read at once than keep attention's padding small."""
    cache = open_cache(view_of(tiny_language_model()), capacity([1] * 200), 2)
    chunks = list(packed_chunks({p: [1] for p in range(200)}, cache))
    assert [len(chunk.ids) for chunk in chunks] == [PREFILL_PIECES] * 3 + [200 - 3 * PREFILL_PIECES]
    assert [p for chunk in chunks for p in chunk.slots] == list(range(200))
    worst = Packed.of([0] * 64, [PREFILL_TOKENS - 63] + [1] * 63, range(0, 64 * 1024, 1024), CPU)
    assert len(worst.tokens) <= PREFILL_TOKENS + PREFILL_PIECES * PREFILL_ROW
    assert len(Packed.of([0] * 9, [3] * 9, range(0, 27, 3), CPU).tokens) == 27  # rows are no longer than the longest


def test_a_prompt_twice_in_a_forward_is_refused():
    cache = open_cache(view_of(tiny_language_model()), [8, 8], 2)
    with pytest.raises(ValueError, match=r"a forward of slots \[1, 1\], expected each once"):
        with cache.prefill([1, 1], [2, 2]):
            pass
