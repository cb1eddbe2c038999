"""What a round tried for one slot, and how the rule judged it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.faults import Fault, fault_of, fault_of_score
from stars_kernels.decoder.rules import Candidate, Rule, Verdict


@dataclass
class Trial:
    """What a round tried for one slot, and what came of it.

    head: index of its first row. candidates: one per row; those behind the first `scored` have no reward yet. sampled:
    tokens in its rows, those past a candidate's end included. rm_scored: tokens that the reward model read. verdicts:
    the rule's, on the candidates that it judged, from the first on. faults: what is wrong with candidates, by index.
    fault: the one that was met, which ends the answer.
    """

    slot: int
    head: int
    candidates: list[Candidate]
    sampled: int
    faults: dict[int, Fault]
    scored: int = 0
    rm_scored: int = 0
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

    @property
    def over(self) -> bool:
        """Whether the rule has taken a candidate, or met a fault."""
        return self.fault is not None or (self.verdict is not None and self.verdict.outcome is not None)

    def wave(self, size: int) -> range:
        """Return the rows to score next, `size` at most."""
        first = self.head + self.scored
        return range(first, first if self.over else self.head + min(self.scored + size, len(self.candidates)))

    def score(self, index: int, reward: float, read: int, error: Exception | None) -> None:
        """Write the reward of the next candidate, for which the reward model read so many tokens or failed."""
        self.candidates[index].reward, self.scored = reward, index + 1
        self.rm_scored += read
        fault = fault_of_score(reward, error)
        if fault is not None:
            self.faults.setdefault(index, fault)

    def judge(self, rule: Rule, answer: Answer) -> None:
        """Show the rule one scored candidate after the other, until one is taken or one with a fault is reached."""
        if self.over:
            return
        best, plan = answer.chosen if self.verdict is None else self.verdict.chosen, rule.plan(answer)
        candidates = [*answer.candidates, *self.candidates[: self.judged]]
        for index in range(self.judged, self.scored):
            self.fault = self.faults.get(index)
            if self.fault is not None:
                return
            candidates.append(self.candidates[index])
            verdict = rule.judge(answer, candidates)
            self.fault = fault_of(verdict, best, candidates, plan)
            if self.fault is not None:
                return
            self.verdicts.append(verdict)
            best = verdict.chosen
            if verdict.outcome is not None:
                return

    def book(self, answer: Answer, eos: Collection[int]) -> None:
        """Write what was tried on the slot's answer, once the round has settled."""
        answer.counts.sampled += self.sampled
        answer.counts.rm_scored += self.rm_scored
        if self.fault is not None:
            answer.fail(self.fault.what, self.fault.cause, attempt=self.candidates[self.judged].attempt)
            return
        assert self.verdict is not None
        answer.add(self.candidates[: self.judged], self.verdicts, len(self.candidates))
        answer.follow(self.verdict, eos)


def grown(
    start: Candidate,
    drawn: Sequence[int],
    logprob: float,
    uniform: float,
    stopped: bool,
    room: int,
    eos: Collection[int],
) -> Candidate:
    """Return what an attempt has become with the tokens that it has drawn; room: of its answer."""
    tokens = [*start.tokens, *drawn]
    ended = stopped or tokens[-1] in eos or len(tokens) == room
    total = start.logprob + logprob
    return replace(start, tokens=tokens, logprob=total, uniform=uniform, stopped=stopped, ended=ended)
