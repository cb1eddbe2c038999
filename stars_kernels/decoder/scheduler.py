"""Runs answers to their ends: which get a slot, which a round is for, how wide it is, and with how much memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, Protocol

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.arenas import Arenas
from stars_kernels.decoder.device_rounds import DeviceRounds
from stars_kernels.decoder.errors import Abandoned, trace_taken_from
from stars_kernels.decoder.memory import MemoryLimits, free_memory, is_out_of_memory
from stars_kernels.decoder.output import FinishReason
from stars_kernels.decoder.protocols import Admission, Settle
from stars_kernels.decoder.round import Round
from stars_kernels.decoder.slots import Slots
from stars_kernels.decoder.trial import Trial
from stars_kernels.decoder.width import AcceptanceHistory, Cost, CpuCost, best_shape

MAX_OPEN_SLOTS = 1024
"""Of a run that is open, whose memory is taken for all slots at once."""

MAX_PASSED = 4
"""Rounds on end that an answer of an open run is passed over in: then one is for those like it, however short."""


class KeptMemory(Protocol):
    """Memory that earlier runs have left to the sides of a round, whether they need it or not."""

    used: bool
    """Whether there may be some."""
    arenas: Arenas
    """What is known of it."""

    def clear(self) -> None:
        """Give it back, and take no more than is needed; what the run itself has is in there too."""


@dataclass
class Played:
    """How many rounds the device has judged, a step ahead of the host, and how many the host has."""

    on_device: int = 0
    by_host: int = 0

    def __str__(self) -> str:
        return f"{self.on_device} judged on the device, {self.by_host} by the host"


@dataclass
class Run:
    """Runs answers: so many at once have a slot, the others wait in turn for one.

    Wherever memory runs out, nothing that was decided is lost, and the run goes on with less at once.
    """

    round: Round
    answers: list[Answer]
    """All that it was given; readable at any time."""
    slots: int = 8
    """Answers side by side, at most."""
    width: int | Literal["auto"] = "auto"
    wave: int | Literal["auto"] = "auto"
    limits: MemoryLimits = field(default_factory=MemoryLimits)
    """Shrinks where memory runs out."""
    cost: Cost = field(default_factory=lambda: CpuCost(segment_size=15))
    """Of a round, on the device that it runs on: what "auto" goes by."""
    kept: KeptMemory | None = None
    """Where the sides of the round take their memory from, and leave it; None = of their own."""
    open: bool = False
    """Whether more answers come, to wait behind the others, and are dropped one by one. Then memory for all slots is
    taken at once."""

    device: DeviceRounds | None = None
    """Plays the round's rounds a step ahead of the host, where the rule and both models allow it."""
    played: Played = field(default_factory=Played)

    def __post_init__(self) -> None:
        self.waiting = deque(self.answers)
        self._slots = Slots(self.round, None if self.kept is None else self.kept.arenas)
        self._history = AcceptanceHistory()

    @property
    def seconds(self) -> dict[str, float]:
        return self.round.seconds

    @property
    def active(self) -> dict[int, Answer]:
        """Answers that have a slot, by slot, those first that have it longest."""
        return self.round.answers

    @property
    def allowed(self) -> int:
        """How many answers may have a slot."""
        most = min(self.slots, MAX_OPEN_SLOTS) if self.open else self.slots
        return min(most, self.limits.batch_size or most)

    def run(self) -> None:
        """Bring every answer to its end or its error."""
        for _ in self.rounds():
            pass

    def close(self) -> None:
        """Free both models' memory, even if a kept error's traceback still refers to it."""
        if self.device is not None:
            self.device.forget()
        self._slots.close()

    def rounds(self) -> Iterator[list[Answer]]:
        """Bring every answer to its end or its error.

        Yields the answers that were admitted, and then those of each round, after it, those first that have their slot
        longest. Between two rounds, waiting answers get the slots of those that have ended.
        """
        while self.waiting or self.active:
            if answers := self.step():
                yield answers

    def step(self) -> list[Answer]:
        """Admit answers, or else play a round; return those in which something is new, if any."""
        self._slots.free([slot for slot, answer in self.active.items() if not answer.active])
        if self.device is not None and not self.active:
            self.device.forget()
        reason = None if self.open else self.round.stop()
        return (self.admit() or self._play()) if reason is None else (self._hear() or self._stop(reason))

    def add(self, answer: Answer) -> None:
        """Let one more answer wait for a slot, in an open run."""
        self.waiting.append(answer)

    def drop(self, answer: Answer, reason: FinishReason) -> None:
        """End one answer as it is, between two rounds."""
        answer.finish_reason = reason
        if answer.began is None:
            self.waiting = deque(other for other in self.waiting if other is not answer)

    def admit(self) -> list[Answer]:
        """Give waiting answers the free slots, and read their prompts; returns them. Some may have failed there.

        If memory runs out, they wait on, and from then on fewer have a slot at once. Any other exception ends those
        that were admitted, but for a warning that the caller has made an error, which ends the run.
        """
        free = max(0, self.allowed - len(self.active))
        chosen = list(islice(self.waiting, min(free, len(self.waiting))))  # any integer may be allowed
        at_once = len(chosen)  # how many there was too little memory for, if there was
        if not self.active:
            at_once = max(at_once, min(self._slots.room.slots, self.allowed), self.allowed if self.open else 0)
        placed, again = list[Admission](), False
        # By earlier runs, or for later ones: it may be all that lacks.
        kept = self.kept is not None and (self.kept.used or self.kept.arenas.spare > 0)
        try:
            if chosen and not self.active and self._slots.is_too_small(chosen[0], self.allowed):
                self._slots.reserve(self.waiting, self.allowed, self.open, least=self.limits.batch_size == 1)
            placed = self._slots.place(chosen)
            chosen = chosen[: len(placed)]
            if chosen:
                self._slots.admit(chosen, placed)
        except Warning:  # which the caller has made an error
            raise
        except Exception as error:
            self._slots.free(admission.slot for admission in placed)
            fewer = at_once + len(self.active) > 1 or (len(self.waiting) > 1 and self.limits.batch_size != 1)
            again = is_out_of_memory(error) and (fewer or kept)
            if not again:
                self._end(chosen, error)
        if again:  # out here nothing holds the prompts' tensors any more: the exception did
            self._make_room(at_once, kept)
            return []
        for _ in chosen:
            self.waiting.popleft()
        return chosen

    def _make_room(self, chosen: int, kept: bool) -> None:
        """Go on with fewer answers at once, as memory ran out where `chosen` more were admitted.

        kept: whether earlier runs have left memory, which is given back first.
        """
        if self.active:
            self.limits.admit_fewer(chosen, len(self.active))
            self._release()
            return
        self._slots.close()
        if self.kept is not None:
            self.kept.clear()
        if not kept:
            self.limits.admit_fewer(chosen, 0)
        free_memory()

    def _play(self) -> list[Answer]:
        """Play a round with some of the active answers, and return those of the round that was booked, or none.

        A round changes nothing before it settles. If memory runs out before, it is to be repeated with half the
        attempts per slot, then with half the slots. Any other exception ends the answers in the round, but for a
        warning that the caller has made an error, which ends the run.
        """
        active = [slot for slot, answer in self.active.items() if answer.active]
        if not active:
            return []
        slots, widths, again = active, list[int](), False
        settle: Settle | None = None
        try:
            slots = self._alike(active)
            widths, wave = self._shape(slots)
            if self.device is not None and wave >= max(widths):
                return self._play_ahead(self.device, slots, max(widths))
            if told := self._hear():
                return told
            trials, settle = self.round.play(slots, widths, wave)
            self._finish(trials, settle)
            self.played.by_host += 1
        except Abandoned:
            return []
        except Warning:  # which the caller has made an error
            raise
        except Exception as error:
            again = settle is None and sum(widths) > 1 and is_out_of_memory(error)
            if not again:
                self._end([self.active[slot] for slot in slots], error)
        if again:  # out here nothing holds the round's tensors any more: the exception did
            self.limits.halve_round(len(slots), max(widths))
            self._release()
            return []
        return [self.active[slot] for slot in slots]

    def _play_ahead(self, device: DeviceRounds, slots: Sequence[int], width: int) -> list[Answer]:
        """Queue the next round, and book the one before it, if there is one; return its answers.

        The next one is for those that go on for certain, but for an end of sequence. Its judgement is queued last: the
        device is busy with the candidates until then. Where they cannot be queued, the round before is booked all the
        same, and it shows when nothing is in flight.
        """
        going = {slot: self.active[slot] for slot in slots if not device.may_end(slot, self.active[slot])}
        queue: Settle | None = None
        try:
            queue = device.prepare(going, self._slots.room.slots, width) if going else None
        except Warning:
            raise
        except Exception:  # Abandoned too
            if device.in_flight is None:
                raise
        told = self._hear()
        if queue is not None:
            try:
                queue()
            except Warning:
                raise
            except Exception as error:
                self._end(list(going.values()), error)
                return list(going.values())
        return told

    def _hear(self) -> list[Answer]:
        """Book the round that is in flight, if one is, and return its answers. An exception ends them."""
        if self.device is None or self.device.in_flight is None:
            return []
        answers = [answer for answer in self.device.in_flight.answers.values() if answer.active]
        try:
            self._book(self.device.collect())
            self.played.on_device += 1
        except Warning:
            raise
        except Exception as error:
            self._end(answers, error)
        return answers

    def _stop(self, reason: FinishReason) -> list[Answer]:
        """End all answers as they are; those that waited never begin."""
        ended = [answer for answer in self.active.values() if answer.active] + list(self.waiting)
        self.waiting.clear()
        for answer in ended:
            answer.finish_reason = reason
        return ended

    def _end(self, answers: Sequence[Answer], error: Exception) -> None:
        """End those of `answers` that have not ended."""
        trace = trace_taken_from(error)
        for answer in answers:
            if answer.active:
                answer.fail("the batch failed", error, trace)

    def _finish(self, trials: Sequence[Trial], settle: Settle) -> None:
        """Make what a judged round commits visible, and write the round on its answers."""
        with self.round.timed("commit"):
            settle()
            self._book(trials)

    def _book(self, trials: Sequence[Trial]) -> None:
        """Write a round on its answers."""
        for trial in trials:
            trial.book(self.active[trial.slot], self.round.eos)
            if trial.fault is None and trial.verdict is not None:
                self._history.judged += trial.judged
                self._history.accepted += trial.verdict.outcome == "accepted"

    def _release(self) -> None:
        """Give back the memory of the last round's rows."""
        self.round.proposer.release()
        self.round.scorer.release()
        free_memory()

    def _alike(self, active: Sequence[int]) -> list[int]:
        """Choose a round's slots: attempts of one kind and size, or shorter ones that fill the answer's room.

        What follows a row (logits, states) is kept after the round's last step alone. The largest size leads; in an
        open run, where more of that size may come without end, so does an answer that was passed over for long.
        """
        answers = self.active
        plans = {slot: self.round.rule.plan(answers[slot]) for slot in active}
        sizes = {slot: answers[slot].size(plan) for slot, plan in plans.items()}
        lead = max(active, key=lambda slot: sizes[slot])
        longest = max(active, key=lambda slot: answers[slot].passed)
        if self.open and answers[longest].passed >= MAX_PASSED:
            lead = longest
        kinds = {slot: (plan.draw, plan.entropy, plan.race, answers[slot].held) for slot, plan in plans.items()}
        alike = [slot for slot in active if kinds[slot] == kinds[lead]]
        size = sizes[lead]
        chosen = [s for s in alike if sizes[s] == size or sizes[s] == answers[s].room < size][: self.allowed]
        for slot in active:
            answers[slot].passed = 0 if slot in chosen else answers[slot].passed + 1
        return chosen

    def _shape(self, slots: Sequence[int]) -> tuple[list[int], int]:
        """How many attempts of each slot to decode side by side, and how many of them are a wave."""
        plans = [self.round.rule.plan(self.active[slot]) for slot in slots]
        attempts, early = max(plan.attempts for plan in plans), any(plan.early for plan in plans)
        miss = self._history.miss if early else 1.0
        given = self.width
        width = best_shape(len(slots), attempts, miss, self.cost).width if given == "auto" else given
        width = min(width, self.limits.width or width, attempts)
        wave: int | Literal["auto"] = self.wave
        self._slots.race = self._slots.race or plans[0].race
        if not early or plans[0].race:  # all are judged; and who goes on in a race lies as it was forked
            wave = width
        if wave == "auto":
            wave = best_shape(len(slots), attempts, miss, self.cost, width).wave
        left = [self.active[slot].left(plan) for slot, plan in zip(slots, plans, strict=True)]
        return [min(width, attempts) for attempts in left], wave
