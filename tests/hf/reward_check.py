"""What every classifier that serves as a reward model must pass: rewards from its cache are its own forward's."""

import torch

from stars_kernels.decoder.protocols import Commit, Rows
from stars_kernels.hf.scoring.classifier import ClassifierScorer
from stars_kernels.hf.view.copying import view_of
from tests.hf.fork_check import PROMPTS, ROWS
from tests.runs import admit


@torch.no_grad()
def check_rewards(model, tolerance=1e-6):
    """The largest difference from the model's own reward of one row's ids, relative to the largest reward.

    Ragged candidates are scored, one of each prompt is accepted, and others are scored behind it, wave by wave.
    """
    generator = torch.Generator().manual_seed(1)
    scorer, prompts = ClassifierScorer(view_of(model), 0), [list(prompt) for prompt in PROMPTS]
    found, expected = [], []

    def own(tokens):
        return model(input_ids=torch.tensor([tokens])).logits[0, 0].item()

    found += admit(scorer, prompts, 18, 6).rewards.tolist()
    expected += map(own, prompts)
    for lengths, waves in (
        ([2, 6, 4, 6, 6, 3], [range(6)]),
        ([1, 6, 2, 6, 6, 4], [[0, 3, 5], [2], [1, 4]]),
        ([1, 3, 2, 6, 5, 4], [range(6)]),
    ):
        tokens = torch.randint(0, 250, (len(ROWS), 6), generator=generator)
        zeros = torch.zeros(len(ROWS), dtype=torch.int64)
        rows = Rows(ROWS, torch.tensor(ROWS), zeros, zeros, zeros)
        scorer.open(rows, tokens, torch.tensor(lengths))
        rewards = {row: r for wave in waves for row, r in zip(wave, scorer.score(wave).rewards.tolist(), strict=True)}
        found += [rewards[row] for row in range(len(ROWS))]
        candidates = [t[:n] for t, n in zip(tokens.tolist(), lengths, strict=True)]
        expected += [own(prompts[p] + candidate) for p, candidate in zip(ROWS, candidates, strict=True)]
        chosen = torch.tensor([1, 3, 4])  # a row of each prompt; those of a model with states end at the last token
        kept = [candidates[row] for row in chosen]
        length, last = torch.tensor([len(c) for c in kept]), torch.tensor([c[-1] for c in kept])
        host = [(p, row, len(c), True) for p, (row, c) in enumerate(zip(chosen.tolist(), kept, strict=True))]
        scorer.commit(Commit(host, torch.arange(3), chosen, length, torch.ones(3, dtype=torch.bool), last))()
        prompts = [prompt + candidate for prompt, candidate in zip(prompts, kept, strict=True)]
    found, expected = (torch.tensor(values, dtype=torch.float64) for values in (found, expected))
    worst = ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
    assert worst <= tolerance, f"{type(model).__name__}: rewards differ by {worst}, expected <= {tolerance}"
    return worst
