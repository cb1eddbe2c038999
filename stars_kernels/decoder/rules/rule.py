"""What a decoding rule is: a plan for each segment, and a judgement of its attempts, one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

Outcome = Literal["accepted", "fallback", "best"]
"""How a candidate came to be taken: it passed the rule's test, or none did, or there was no test but to be the best."""


@dataclass
class Candidate:
    """An attempt at a segment, as a rule sees it.

    tokens: of the segment, up to its end. reward: of the answer with them. uniform: the attempt's random number in
    (0, 1), u(a). stopped: whether a stop string or criterion ends the answer with them. threshold: what a rule with a
    threshold asked of it.
    """

    tokens: list[int]
    reward: float
    uniform: float
    stopped: bool = False
    threshold: float = math.nan


class Progress(Protocol):
    """What a rule sees of an answer (`decoder.answer.Answer`) while its next segment is under decision."""

    tokens: list[int]
    """Of the segments that are decided."""
    prompt_reward: float
    """r(x), of the empty answer."""
    limit: int
    """Tokens the answer may have."""
    max_new_tokens: int
    """The budget, which is more than `limit` where the context ends sooner."""

    @property
    def blocks(self) -> int:
        """How many segments are decided."""


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

    def plan(self, answer: Progress) -> Plan:
        """Plan the answer's next segment. No later plan of an answer is for more tokens than its first."""

    def judge(self, answer: Progress, candidates: Sequence[Candidate]) -> Verdict:
        """Judge the last of `candidates`; those before it were judged before, and none of them was taken."""


def best(candidates: Sequence[Candidate]) -> int:
    """Return the index of the candidate with the highest reward, of equal ones the first."""
    return max(range(len(candidates)), key=lambda i: (candidates[i].reward, -i))
