"""`ops.accept`, for rounds that stay on a device, decides as the rule `Stars` does on the host."""

import itertools
import math

import pytest
import torch

from stars_kernels import Stars
from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.rules import Candidate
from stars_kernels.ops import accept
from stars_kernels.ops.accept import ACCEPTED, FALLBACK, RETRY
from stars_kernels.ops.philox import accept_uniforms

OUTCOMES = {"accepted": ACCEPTED, "fallback": FALLBACK, None: RETRY}


def by_rule(rule, answer, tried):
    """Outcome, chosen candidate and how many were judged, of rewards tried one after the other."""
    candidates = []
    uniforms = accept_uniforms([answer.key] * len(tried), [0] * len(tried), range(len(tried)))
    for reward, uniform in zip(tried, uniforms, strict=True):
        candidates.append(Candidate([7, 7], reward, uniform))
        verdict = rule.judge(answer, candidates)
        if verdict.outcome is not None:
            break
    return OUTCOMES[verdict.outcome], verdict.chosen, candidates


@pytest.mark.parametrize("how", ["soft", "hard"])
def test_the_op_decides_as_the_rule(how):
    generator = torch.Generator().manual_seed(0)
    found = set()
    for seed, width in itertools.product(range(60), (1, 3, 7)):
        rule = Stars(max_attempts=7, reward_threshold=1.5, beta=0.4, accept=how)
        answer = Answer(seed + 1, [1], 20, prompt_reward=-0.5)
        rewards = torch.randn(7, dtype=torch.float64, generator=generator)
        rewards[3] = rewards[1]  # a tie goes to the first
        expected = by_rule(rule, answer, rewards.tolist())
        tau = torch.full((1, width), rule.threshold(answer, 2), dtype=torch.float64)
        best, chosen, first, outcome = torch.tensor([-math.inf], dtype=torch.float64), torch.tensor([-1]), 0, RETRY
        while outcome == RETRY:
            columns = rewards[first : first + width]
            valid = torch.arange(width) < len(columns)
            padded = torch.nn.functional.pad(columns, (0, width - len(columns)))
            column, what = accept(
                padded[None], valid[None], tau, torch.tensor([answer.key]), torch.tensor([0]), torch.tensor([first]),
                best, chosen, max_attempts=7, beta=0.4, hard=how == "hard",
            )  # fmt: skip
            outcome = what.item()
            if column.item() >= 0:
                best, chosen = columns[column], first + column
            first += width
        assert (outcome, chosen.item()) == expected[:2]
        found.add(outcome)
    assert found == {ACCEPTED, FALLBACK}
