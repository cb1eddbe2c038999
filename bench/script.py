"""The script of accepted attempts: a rule that takes the same ones in every loop, whatever the rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stars_kernels import Stars
from stars_kernels.decoder.rules import AnswerSoFar, Candidate, Plan, Verdict

MEAN_ATTEMPTS = 4
ATTEMPTS = (3, 5, 7, 1, 2, 11, 1, 2)
"""The attempt that is accepted, segment by segment; each prompt starts at another place.

The mean is exactly 4, also over the first two, the first four, and eight prompts of any number of segments.
The spread is that of a geometric distribution, as for a reward model that takes one attempt in four.
"""


@dataclass(frozen=True)
class Script:
    """Accept the attempts that the pattern names; their rewards are computed in full, and decide nothing.

    keys: of the prompts, in their order.
    """

    segment_size: int
    keys: tuple[int, ...]

    def plan(self, answer: AnswerSoFar) -> Plan:
        return Plan(self.segment_size, Stars.max_attempts, early=True)

    def judge(self, answer: AnswerSoFar, candidates: Sequence[Candidate]) -> Verdict:
        place = self.keys.index(answer.key) + answer.decided
        if len(candidates) == ATTEMPTS[place % len(ATTEMPTS)]:
            return Verdict(len(candidates) - 1, "accepted")
        return Verdict(0, None)
