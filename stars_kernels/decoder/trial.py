"""What a round tried for one slot, and how the rule judged it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.faults import Fault, fault_of
from stars_kernels.decoder.rules import Candidate, Rule, Verdict


@dataclass
class Trial:
    """What a round tried for one slot, and what came of it.

    head: index of its first row. candidates: one per row. sampled: tokens in its rows, those past a candidate's end
    included. rm_scored: tokens that the reward model read. verdicts: the rule's, on the candidates that it judged, from
    the first on. fault: what is wrong with the candidate after the judged ones, which ends the answer.
    """

    slot: int
    head: int
    candidates: list[Candidate]
    sampled: int
    rm_scored: int
    verdicts: list[Verdict] = field(default_factory=list)
    fault: Fault | None = None

    @property
    def judged(self) -> int:
        """How many candidates the rule judged."""
        return len(self.verdicts)

    @property
    def verdict(self) -> Verdict | None:
        """The last one; None where the first candidate had a fault."""
        return self.verdicts[-1] if self.verdicts else None

    def judge(self, rule: Rule, answer: Answer, faults: Mapping[int, Fault]) -> None:
        """Show the rule one candidate after the other, until one is taken or one of `faults`, by row, is reached."""
        candidates, best, plan = list(answer.candidates), answer.chosen, rule.plan(answer)
        for column, candidate in enumerate(self.candidates):
            if self.head + column in faults:
                self.fault = faults[self.head + column]
                return
            candidates.append(candidate)
            verdict = rule.judge(answer, candidates)
            self.fault = fault_of(verdict, best, candidates, plan)
            if self.fault is not None:
                return
            self.verdicts.append(verdict)
            best = verdict.chosen
            if verdict.outcome is not None:
                return
