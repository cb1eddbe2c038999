"""What a decoding rule is: a plan for each segment, and a judgement of its attempts, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from stars_kernels.decoder.answer import Answer, Candidate

Outcome = Literal["accepted", "fallback", "best"]
"""How a candidate came to be taken: it passed the rule's test, or none did, or there was no test but to be the best."""


@dataclass(frozen=True)
class Plan:
    """How the attempts at one segment come to be.

    size: tokens of an attempt, at most. attempts: how many are judged, at most.
    """

    size: int
    attempts: int


class Verdict(NamedTuple):
    """What follows from the attempts so far: candidate `chosen` is taken, or is the best until there are more.

    chosen: index of a candidate. outcome: None = one more attempt is wanted.
    """

    chosen: int
    outcome: Outcome | None


class Rule(Protocol):
    """Decides a segment, by nothing but the methods' arguments, so that an answer does not depend on its batch."""

    def plan(self, answer: Answer) -> Plan:
        """Plan the answer's next segment. No later plan of an answer is for more tokens than its first."""

    def judge(self, answer: Answer, candidates: Sequence[Candidate]) -> Verdict:
        """Judge the last of `candidates`; those before it were judged before, and none of them was taken."""


def best(candidates: Sequence[Candidate]) -> int:
    """Return the index of the candidate with the highest reward, of equal ones the first."""
    return max(range(len(candidates)), key=lambda i: (candidates[i].reward, -i))
