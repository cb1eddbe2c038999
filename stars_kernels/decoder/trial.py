"""What a round tried for one slot, and how the rule judged it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.faults import Fault, fault_of
from stars_kernels.decoder.rules import Candidate, Rule, Verdict


@dataclass
class Trial:
    """What a round tried for one slot, and what came of it.

    head: index of its first row. candidates: one per row. judged: how many of them the rule judged, from the first on.
    verdict: the rule's last; None where the first candidate had a fault. fault: what is wrong with the candidate after
    the judged ones, which ends the answer. sampled: tokens in its rows, those past a candidate's end included.
    rm_scored: tokens that the reward model read.
    """

    slot: int
    head: int
    candidates: list[Candidate]
    sampled: int
    rm_scored: int
    judged: int = 0
    verdict: Verdict | None = None
    fault: Fault | None = None

    def judge(self, rule: Rule, answer: Answer, faults: Mapping[int, Fault]) -> None:
        """Show the rule one candidate after the other, until one is taken or one of `faults`, by row, is reached."""
        candidates, best, planned = list(answer.candidates), answer.chosen, rule.plan(answer).attempts
        for column, candidate in enumerate(self.candidates):
            if self.head + column in faults:
                self.fault = faults[self.head + column]
                return
            candidates.append(candidate)
            verdict = rule.judge(answer, candidates)
            self.fault = fault_of(verdict, best, len(candidates), planned)
            if self.fault is not None:
                return
            self.judged, self.verdict, best = column + 1, verdict, verdict.chosen
            if verdict.outcome is not None:
                return
