"""STARS (arXiv 2511.03827): a segment is sampled until an attempt is accepted against a rising threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stars_kernels.decoder.checks import check, check_count, check_number
from stars_kernels.decoder.rules.rule import AnswerSoFar, Candidate, Plan, Verdict, best
from stars_kernels.ops.philox import MAX_ATTEMPTS


@dataclass(frozen=True)
class Stars:
    """Take the first attempt that is accepted, after max_attempts the best. `StarsConfig` explains the settings."""

    segment_size: int = 15
    max_attempts: int = 20
    alpha: float = 0.5
    beta: float | None = None
    reward_threshold: float | None = None
    accept: Literal["soft", "hard"] = "soft"

    def __post_init__(self) -> None:
        check_count(self, "segment_size")
        check_count(self, "max_attempts", MAX_ATTEMPTS)
        check_number(self, "alpha", lambda x: 0 <= x <= 1, "a number in [0, 1]")
        check_number(self, "beta", lambda x: x > 0, "a finite number > 0", optional=True)
        check_number(self, "reward_threshold", lambda x: True, "a finite number", optional=True)
        check(self, "accept", self.accept in ("soft", "hard"), '"soft" or "hard"')

    def plan(self, answer: AnswerSoFar) -> Plan:
        return Plan(self.segment_size, self.max_attempts, early=True)

    def judge(self, answer: AnswerSoFar, candidates: Sequence[Candidate]) -> Verdict:
        last = candidates[-1]
        threshold = self.threshold(answer, len(answer.tokens) + len(last.tokens))
        if self.accepts(last, threshold):
            return Verdict(len(candidates) - 1, "accepted", threshold)
        return Verdict(best(candidates), "fallback" if len(candidates) == self.max_attempts else None, threshold)

    def threshold(self, answer: AnswerSoFar, tokens: int) -> float:
        """Return tau(n) = min(r*, r0 + n (r* - r0) / max_new_tokens), with r0 = (1 - alpha) r(x) + alpha r*."""
        target = self.reward_threshold
        assert target is not None, "r* is calibrated before anything is judged"
        start = (1 - self.alpha) * answer.prompt_reward + self.alpha * target
        return min(target, start + tokens * (target - start) / answer.max_new_tokens)

    def accepts(self, candidate: Candidate, threshold: float) -> bool:
        """Say whether u < min(1, exp((r - tau) / beta)); hard: whether r >= tau."""
        gap = candidate.reward - threshold
        if self.accept == "hard":
            return gap >= 0
        assert self.beta is not None
        return candidate.uniform < math.exp(min(0.0, gap / self.beta))
