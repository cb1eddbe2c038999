"""Speculative Rejection (arXiv 2410.20290): whole answers grow side by side, and the worst are dropped on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from stars_kernels.decoder.checks import check_count, check_number
from stars_kernels.decoder.rules.rule import AnswerSoFar, Candidate, Plan, Verdict, best
from stars_kernels.ops.philox import MAX_ATTEMPTS


@dataclass(frozen=True)
class SpeculativeRejection:
    """Let n attempts at the whole answer grow; at every border keep the best of them, and at last take the best.

    A border comes after every `segment_size` tokens. There the ceil(keep * m) of the m attempts that are in the race
    stay, those with the highest reward so far, of equal ones the lower attempts. One that has ended stays or goes by
    its reward as the others do. Once all that stay have ended, the best of them is the answer.

    As in the paper (algorithm 1, with keep = 1 - alpha), but for where the borders are: there, a batch as large as
    memory holds grows until memory runs out. Here n and the borders are settings, so that an answer does not depend on
    the machine. (Its code rounds keep * m to the nearest; this rounds up, so that one attempt stays at least.)
    """

    n: int
    keep: float = 0.5
    segment_size: int = 32

    def __post_init__(self) -> None:
        check_count(self, "n", MAX_ATTEMPTS)
        check_number(self, "keep", lambda x: 0 < x < 1, "a number in (0, 1)")
        check_count(self, "segment_size")

    def plan(self, answer: AnswerSoFar) -> Plan:
        return Plan(self.segment_size, answer.racing or self.n, race=True)

    def judge(self, answer: AnswerSoFar, candidates: Sequence[Candidate]) -> Verdict:
        if len(candidates) < self.plan(answer).attempts:
            return Verdict(best(candidates), None)
        order = sorted(range(len(candidates)), key=lambda i: (-candidates[i].reward, candidates[i].attempt))
        stay = sorted(order[: math.ceil(Fraction(str(self.keep)) * len(candidates))])
        if all(candidates[i].ended for i in stay):
            return Verdict(order[0], "best")
        return Verdict(order[0], None, keep=tuple(stay))
