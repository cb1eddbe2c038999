"""One prompt's answer while it grows: its tokens, the attempts at its next segment, its trace and counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stars_kernels.decoder.config import Trace
from stars_kernels.decoder.errors import DecodeError, message_of, with_cause
from stars_kernels.decoder.output import Counts, FinishReason, Segment
from stars_kernels.decoder.rules import Candidate, Plan, Verdict

FindStop = Callable[[list[int], int], int | None]
"""(answer tokens, how many of them are decided) -> answer tokens up to the one that ends the answer, or None."""


@dataclass
class Answer:
    """One prompt's answer, from the empty one to the end."""

    key: int
    prompt: Sequence[int]
    limit: int
    """Tokens the answer may have: the budget, or less where the context ends."""
    request: Any = None
    """What the sides of a round know of it besides; see `Admission`."""
    find_stop: FindStop | None = None
    max_new_tokens: int = 0
    """The budget; 0 = `limit`."""
    tokens: list[int] = field(default_factory=list)
    reward: float = math.nan
    prompt_reward: float = math.nan
    segments: list[Segment] = field(default_factory=list)
    """Decided ones, and the one under decision as far as it has been judged."""
    candidates: list[Candidate] = field(default_factory=list)
    """Judged attempts at the segment under decision; in a race, those of this turn, and kept ones that have ended."""
    going: list[Candidate] = field(default_factory=list)
    """Of a race, the kept attempts that have yet to grow in this turn."""
    racing: int = 0
    """How many attempts were kept at the last border; 0 = it is the first turn, or no race."""
    chosen: int = -1
    """Index of the candidate that was copied behind the prefix: the best so far; -1 = none yet."""
    counts: Counts = field(default_factory=Counts)
    finish_reason: FinishReason | None = None
    error: DecodeError | None = None
    trace: Trace = "segments"
    """Whether the tokens of all judged attempts are kept ("full")."""
    began: Mapping[str, float] | None = None
    """Seconds by phase that its run had taken before it was admitted; None = it was not."""
    passed: int = 0
    """Rounds on end that were not for it, while it had a slot."""

    def __post_init__(self) -> None:
        self.max_new_tokens = self.max_new_tokens or self.limit
        self.counts.prompt = len(self.prompt)

    @property
    def active(self) -> bool:
        return self.finish_reason is None and self.error is None

    @property
    def needs(self) -> int:
        """Tokens of the prompt and of the longest answer."""
        return len(self.prompt) + self.limit

    @property
    def room(self) -> int:
        """Tokens the answer may still grow by."""
        return self.limit - len(self.tokens)

    @property
    def decided(self) -> int:
        """Segments that are decided."""
        return len(self.segments) - self._under_decision

    @property
    def _under_decision(self) -> bool:
        return bool(self.candidates or self.racing)

    @property
    def held(self) -> int:
        """Tokens that the attempts of the next round have: those that go on in a race, which all have as many."""
        return len(self.going[0].tokens) if self.going else 0

    def size(self, plan: Plan) -> int:
        """Return the tokens that an attempt may grow by: the plan's, or the answer's room."""
        return min(plan.size, self.room - self.held)

    def left(self, plan: Plan) -> int:
        """Return how many attempts have yet to be tried before the plan's last."""
        return len(self.going) if self.racing else plan.attempts - len(self.candidates)

    def begin(self, reward: float, read: int, error: Exception | None, began: Mapping[str, float]) -> None:
        """Record that the prompt was read, and the empty answer's reward, or why it has none.

        read: tokens that the reward model read. began: see `began`.
        """
        self.reward = self.prompt_reward = reward
        self.counts.rm_scored += read
        self.began = began
        if error is not None:
            self.fail("the reward model failed on the empty answer", error)
        elif not math.isfinite(reward):
            self.fail(f"the reward of the empty answer is {reward}, expected a finite number")

    def starts(self, count: int) -> list[Candidate]:
        """Return what the next `count` attempts start from: nothing, or what they hold in a race."""
        if self.racing:
            return [replace(kept, held=len(kept.tokens)) for kept in self.going[:count]]
        first = len(self.candidates)
        return [Candidate([], math.nan, math.nan, logprob=0.0, attempt=first + i) for i in range(count)]

    def number(self, plan: Plan, attempt: int) -> int:
        """Return the number that an attempt's random numbers are made from: its own, where all are of one length.

        A rejected attempt may reach behind the one that is taken where they end by entropy. The next segment must not
        draw its noise again, in which what was just rejected would be rare: numbers go on from segment to segment.
        """
        if plan.entropy is None or plan.draw == "likeliest":
            return attempt
        return self.counts.attempts - len(self.candidates) + attempt

    def add(self, candidates: Sequence[Candidate], verdicts: Sequence[Verdict], width: int) -> None:
        """Record judged attempts of a round of `width` at the segment under decision, each with its verdict."""
        if not self._under_decision:
            self.segments.append(Segment())
        self.candidates += candidates
        self.going = self.going[len(candidates) :]
        self.chosen = verdicts[-1].chosen
        segment, counts = self.segments[-1], self.counts
        for entry, candidate in enumerate(candidates, start=segment.attempts):
            candidate.entry = entry
        segment.rewards += [candidate.reward for candidate in candidates]
        segment.thresholds += [verdict.threshold for verdict in verdicts]
        segment.lengths += [len(candidate.tokens) for candidate in candidates]
        if self.trace == "full":
            segment.tokens = [*(segment.tokens or ()), *(candidate.tokens for candidate in candidates)]
        segment.widths.append(width)
        segment.chosen = self.candidates[self.chosen].entry
        counts.judged += sum(len(candidate.tokens) - candidate.held for candidate in candidates)
        counts.attempts += sum(candidate.held == 0 for candidate in candidates)

    def keep(self, kept: Sequence[int]) -> None:
        """Let these of a race's candidates go on; those that have ended wait among the next turn's candidates."""
        survivors = [self.candidates[i] for i in kept]
        self.segments[-1].kept.append(sorted(survivor.attempt for survivor in survivors))
        self.racing, self.chosen = len(survivors), -1
        self.candidates = [survivor for survivor in survivors if survivor.ended]
        self.going = [survivor for survivor in survivors if not survivor.ended]

    def follow(self, verdict: Verdict, eos: Collection[int]) -> None:
        """Do what the last verdict of a round says, if it says something yet: take an attempt, or let some go on."""
        if verdict.outcome is not None:
            self.take(verdict, eos)
        elif verdict.keep is not None:
            self.keep(verdict.keep)

    def take(self, verdict: Verdict, eos: Collection[int]) -> None:
        """Make the chosen candidate a part of the answer, which it may end."""
        assert verdict.outcome is not None
        segment, counts, taken = self.segments[-1], self.counts, self.candidates[verdict.chosen]
        segment.outcome = verdict.outcome
        counts.accepted += verdict.outcome == "accepted"
        self.tokens += taken.tokens
        counts.rejections = counts.attempts - len(self.segments)
        counts.rejected = counts.judged - len(self.tokens)
        self.reward = taken.reward
        self.candidates, self.going, self.racing, self.chosen = [], [], 0, -1
        if taken.stopped:
            self.finish_reason = "stop"
        elif self.tokens[-1] in eos:
            self.finish_reason = "eos"
        elif self.room == 0:
            self.finish_reason = "length" if self.limit == self.max_new_tokens else "context"

    def fail(
        self,
        what: str,
        cause: Exception | None = None,
        trace: str | None = None,
        segment: int | None = None,
        attempt: int | None = None,
    ) -> None:
        """End the answer with an error.

        what: failed. trace: as in `with_cause`. segment: where; None = the one under decision. attempt: at it, if any.
        """
        segment = self.decided if segment is None else segment
        at = f"segment {segment}: " + ("" if attempt is None else f"attempt {attempt}: ")
        why = "" if cause is None else f": {type(cause).__name__}: {message_of(cause)}"
        self.error = DecodeError(f"{at}{what}{why}", what=what, segment=segment, attempt=attempt)
        if cause is not None:
            with_cause(self.error, cause, trace)
