"""Runs a batch of answers to their ends: which of them a round is for, how wide, and with how much memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.errors import trace_taken_from
from stars_kernels.decoder.memory import MemoryLimits, free_memory, is_out_of_memory
from stars_kernels.decoder.protocols import Settle
from stars_kernels.decoder.round import Round
from stars_kernels.decoder.trial import Trial
from stars_kernels.decoder.width import AcceptanceHistory, Cost, CpuCost, best_shape


@dataclass
class Run:
    """Runs one batch: `begin`, then `rounds`; the answers are readable at any time."""

    round: Round
    width: int | Literal["auto"] = "auto"
    wave: int | Literal["auto"] = "auto"
    limits: MemoryLimits = field(default_factory=MemoryLimits)
    """Shrinks where memory runs out."""
    cost: Cost = field(default_factory=lambda: CpuCost(segment_size=15))
    """Of a round, on the device that it runs on: what "auto" goes by."""

    @property
    def answers(self) -> list[Answer]:
        return self.round.answers

    @property
    def seconds(self) -> dict[str, float]:
        return self.round.seconds

    def run(self) -> None:
        """Bring every answer to its end or its error."""
        self.begin()
        for _ in self.rounds():
            pass

    def begin(self) -> None:
        """Read the prompts. Where it raises, no answer has changed, and a smaller batch may fit in memory."""
        self.round.begin()

    def close(self) -> None:
        """Free both models' memory, even if a kept error's traceback still refers to it."""
        self.round.proposer.close()
        self.round.scorer.close()

    def rounds(self) -> Iterator[list[int]]:
        """Bring every begun answer to its end or its error; yields the slots of every round, after it.

        A round changes nothing before it settles. If memory runs out before, it is repeated with half the attempts per
        slot, then with half the slots. Any other exception ends the answers in the round, but for a warning that the
        caller has made an error, which ends the run.
        """
        history = AcceptanceHistory()
        yield list(range(len(self.answers)))  # begun, or failed there
        while active := [slot for slot, answer in enumerate(self.answers) if answer.active]:
            slots, widths, again = active, list[int](), False
            settle: Settle | None = None
            try:
                slots = self._slots(active)
                widths, wave = self._shape(slots, history)
                trials, settle = self.round.play(slots, widths, wave)
                self._finish(trials, settle, history)
            except Warning:  # which the caller has made an error
                raise
            except Exception as error:
                again = settle is None and sum(widths) > 1 and is_out_of_memory(error)
                if not again:
                    self.fail(slots, error)
            if again:  # out here nothing holds the round's tensors any more: the exception did
                self._shrink(len(slots), max(widths))
            else:
                yield slots

    def fail(self, slots: Sequence[int], error: Exception) -> None:
        """End those of `slots` that have not ended."""
        trace = trace_taken_from(error)
        for slot in slots:
            if self.answers[slot].active:
                self.answers[slot].fail("the batch failed", error, trace)

    def _finish(self, trials: Sequence[Trial], settle: Settle, history: AcceptanceHistory) -> None:
        """Make what a judged round commits visible, and write the round on its answers."""
        with self.round.timed("commit"):
            settle()
            for trial in trials:
                trial.book(self.answers[trial.slot], self.round.eos)
                if trial.fault is None and trial.verdict is not None:
                    history.judged += trial.judged
                    history.accepted += trial.verdict.outcome == "accepted"

    def _shrink(self, slots: int, width: int) -> None:
        self.limits.halve_round(slots, width)
        self.round.proposer.release()
        self.round.scorer.release()
        free_memory()

    def _slots(self, active: Sequence[int]) -> list[int]:
        """Choose a round's slots: attempts of one kind and size, or shorter ones that fill the answer's room.

        What follows a row (logits, states) is kept after the round's last step alone.
        """
        answers = self.answers
        plans = {slot: self.round.rule.plan(answers[slot]) for slot in active}
        sizes = {slot: answers[slot].size(plan) for slot, plan in plans.items()}
        largest = max(active, key=lambda slot: sizes[slot])
        kinds = {slot: (plan.draw, plan.entropy, plan.race, answers[slot].held) for slot, plan in plans.items()}
        alike = [slot for slot in active if kinds[slot] == kinds[largest]]
        return [s for s in alike if sizes[s] in (sizes[largest], answers[s].room)][: self.limits.prompts]

    def _shape(self, slots: Sequence[int], history: AcceptanceHistory) -> tuple[list[int], int]:
        """How many attempts of each slot to decode side by side, and how many of them are a wave."""
        plans = [self.round.rule.plan(self.answers[slot]) for slot in slots]
        attempts, early = max(plan.attempts for plan in plans), any(plan.early for plan in plans)
        miss = history.miss if early else 1.0
        given = self.width
        width = best_shape(len(slots), attempts, miss, self.cost).width if given == "auto" else given
        width = min(width, self.limits.width or width, attempts)
        wave: int | Literal["auto"] = self.wave
        if not early or plans[0].race:  # all are judged; and who goes on in a race lies as it was forked
            wave = width
        if wave == "auto":
            wave = best_shape(len(slots), attempts, miss, self.cost, width).wave
        left = [self.answers[slot].left(plan) for slot, plan in zip(slots, plans, strict=True)]
        return [min(width, attempts) for attempts in left], wave
