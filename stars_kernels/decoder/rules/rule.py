"""What a decoding rule is: a plan for each segment, and a judgement of its attempts, one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

Outcome = Literal["accepted", "fallback", "best"]
"""How an attempt came to be taken: accepted = it passed the test; fallback = none did; best = there is no test."""
Draw = Literal["sample", "likeliest"]
"""What an attempt's tokens are: sample = drawn with its random numbers from the filtered distribution; likeliest =
attempt a takes the token with the a-th largest logit, of equal ones the smaller id: nothing is random or filtered."""


@dataclass
class Candidate:
    """An attempt at a segment, as a rule sees it.

    tokens: of the segment, cut where it ends. reward: of the answer with these tokens. uniform: u, the attempt's random
    number in (0, 1). stopped: whether a stop ends the answer with them. logprob: the sum of its tokens'
    log-probabilities in nats, under the filtered distribution that they were sampled from; of the likeliest tokens,
    under softmax(logits).
    attempt: its number. ended: whether the answer ends with its tokens: an end of sequence, a stop, no more room.
    held: how many of the tokens it had before its last turn, in a race. entry: its index in the segment's trace.
    """

    tokens: list[int]
    reward: float
    uniform: float
    stopped: bool = False
    logprob: float = math.nan
    attempt: int = 0
    ended: bool = False
    held: int = 0
    entry: int = -1


class AnswerSoFar(Protocol):
    """What a rule sees of an answer while its next segment is under decision."""

    key: int
    """The request's, which its random numbers are made from."""
    tokens: list[int]
    """Of the segments that are decided."""
    prompt_reward: float
    """r(x), of the empty answer; NaN when the first plan is asked for."""
    limit: int
    """Tokens the answer may have."""
    max_new_tokens: int
    """The budget, which is more than `limit` where the context ends sooner."""

    racing: int
    """Of a race, how many attempts went on from the border before; 0 before the first border, and without a race."""

    @property
    def decided(self) -> int:
        """How many segments are decided."""


class Plan(NamedTuple):
    """How the attempts at one segment come to be.

    size: tokens per attempt, at most; >= 1. attempts: per segment, at most; >= 1. At attempt number
    `attempts`, `judge` takes one.
    early: whether one may be taken before the last, so that not all need to be sampled.
    draw: see `Draw`.
    entropy: a bound in nats: an attempt ends before the first token, after its own first one, whose distribution
        softmax(logits) has an entropy of that or more; None = none.
    race: whether the attempts that a verdict keeps go on, by up to `size` more tokens each turn, until one that has
        ended is taken. In a later turn, `attempts` is how many were kept; those of them that have ended are among its
        candidates from the start.
    """

    size: int
    attempts: int
    early: bool = False
    draw: Draw = "sample"
    entropy: float | None = None
    race: bool = False


class Verdict(NamedTuple):
    """What follows from the attempts so far.

    chosen: index of the one that is taken or, with outcome None, of the best so far. threshold: tau, which the last of
    them was compared with; NaN where the rule has none. keep: in a race, once its turn's last attempt is judged and
    none is taken, indices of those that go on: in rising order, not all of them ended.
    """

    chosen: int
    outcome: Outcome | None
    threshold: float = math.nan
    keep: tuple[int, ...] | None = None


class Rule(Protocol):
    """Decides a segment, by nothing but the methods' arguments, so that an answer does not depend on its batch."""

    def plan(self, answer: AnswerSoFar) -> Plan:
        """Plan the next segment. The first plan is asked for before r(x) is known; none later is for more tokens."""

    def judge(self, answer: AnswerSoFar, candidates: Sequence[Candidate]) -> Verdict:
        """Judge the last of `candidates`; none before it was taken.

        Choose it, or the one chosen before it came; in a race, any that may go on.
        """


def best(candidates: Sequence[Candidate]) -> int:
    """Return the index of the candidate with the highest reward, of equal ones the first."""
    rewards = [candidate.reward for candidate in candidates]
    return rewards.index(max(rewards))
