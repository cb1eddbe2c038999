"""The best of several attempts: at the whole answer (best-of-N), or at each block of it; and plain sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stars_kernels.decoder.checks import check, check_count, is_int, plain
from stars_kernels.decoder.rules.rule import AnswerSoFar, Candidate, Plan, Verdict, best
from stars_kernels.ops.philox import MAX_ATTEMPTS


@dataclass(frozen=True)
class BestOf:
    """Sample n whole answers and take the one with the highest reward."""

    n: int

    def __post_init__(self) -> None:
        check_count(self, "n", MAX_ATTEMPTS)

    def plan(self, answer: AnswerSoFar) -> Plan:
        return Plan(answer.limit, self.n)

    def judge(self, answer: AnswerSoFar, candidates: Sequence[Candidate]) -> Verdict:
        return Verdict(best(candidates), "best" if len(candidates) == self.n else None)


@dataclass(frozen=True)
class Plain(BestOf):
    """Sample one answer: the reward is told and decides nothing."""

    n: int = 1


@dataclass(frozen=True)
class BlockBestOf:
    """Take the best of several attempts at each block of `segment_size` tokens.

    n: attempts at a block, or one number per block; blocks behind its end take its last. A decaying schedule is
        AdaSearch's (arXiv 2510.23334).
    """

    n: int | tuple[int, ...]
    segment_size: int = 15

    def __post_init__(self) -> None:
        check_count(self, "segment_size")
        numbers = tuple(map(plain, self.n)) if isinstance(self.n, list | tuple) else plain(self.n)
        object.__setattr__(self, "n", numbers)
        valid = all(is_int(count) and 1 <= count < MAX_ATTEMPTS for count in self.schedule)
        expected = f"an integer from 1 to {MAX_ATTEMPTS - 1}, or a list of them, one per block"
        check(self, "n", valid and bool(self.schedule), expected)

    @property
    def schedule(self) -> tuple[int, ...]:
        """Attempts per block; the last number holds for all further blocks."""
        return self.n if isinstance(self.n, tuple) else (self.n,)

    def plan(self, answer: AnswerSoFar) -> Plan:
        return Plan(self.segment_size, self.schedule[min(answer.decided, len(self.schedule) - 1)])

    def judge(self, answer: AnswerSoFar, candidates: Sequence[Candidate]) -> Verdict:
        done = len(candidates) == self.plan(answer).attempts
        return Verdict(best(candidates), "best" if done else None)
