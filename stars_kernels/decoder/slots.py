"""The slots: which answer has which, and where its tokens lie in the arenas of both models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.protocols import Admission, Room
from stars_kernels.decoder.round import Round
from stars_kernels.decoder.transfer import to_host

NO_ROOM = Room(slots=0, tokens=0, answer=0, segment=0)


class Slots:
    """The slots of a round's models, and the places that their answers have."""

    def __init__(self, round: Round) -> None:
        self.round = round
        self.room = NO_ROOM
        """The memory that was reserved."""
        self.places: dict[int, tuple[int, int]] = {}
        """(first place, how many) by slot, of those that are taken."""

    @property
    def answers(self) -> dict[int, Answer]:
        """Answers by slot, those first that have it longest."""
        return self.round.answers

    def reserve(self, answers: Iterable[Answer], slots: int, more: bool = False) -> None:
        """Take the memory for so many of these answers at once, whichever they are; for one slot, for the first.

        more: take it for `slots` answers like the largest, however few there are yet.
        """
        self.room = NO_ROOM
        plans = [(answer, self.round.rule.plan(answer)) for answer in answers]
        needs = [answer.needs for answer, _ in plans]
        if more:
            needs += [max(needs)] * slots
        slots = min(slots, len(needs))
        limit = max(answer.max_new_tokens if more else answer.limit for answer, _ in plans)
        room = Room(
            slots=slots,
            tokens=sum(sorted(needs)[-slots:]) if slots > 1 else needs[0],
            answer=limit,
            segment=max(limit if plan.race else min(plan.size, limit) for _, plan in plans),
        )
        with self.round.timed("prefill"):
            self.round.proposer.reserve(room)
            self.round.scorer.reserve(room)
        self.room = room

    def close(self) -> None:
        """Give the memory back, even if a kept error's traceback still refers to it."""
        self.round.proposer.close()
        self.round.scorer.close()
        self.room = NO_ROOM

    def place(self, answers: Sequence[Answer]) -> list[Admission]:
        """Find free slots and places for the first of these answers, for as many as there are."""
        free = (slot for slot in range(self.room.slots) if slot not in self.places)
        found = list[Admission]()
        for answer, slot in zip(answers, free, strict=False):
            start = self._first_free(answer.needs)
            if start is None:
                break
            self.places[slot] = (start, answer.needs)
            found.append(Admission(slot, start, answer.prompt, answer.request))
        return found

    def _first_free(self, count: int) -> int | None:
        """Where the first free stretch of `count` places begins; None where there is none."""
        start = 0
        for place, length in sorted(self.places.values()):
            if place - start >= count:
                return start
            start = place + length
        return start if self.room.tokens - start >= count else None

    def admit(self, answers: Sequence[Answer], admissions: Sequence[Admission]) -> None:
        """Read the prompts of answers that were placed. Where it raises, no answer has changed."""
        began = dict(self.round.seconds)
        with self.round.timed("prefill"):
            self.round.proposer.admit(admissions)
            scores = self.round.scorer.admit(admissions)
            rewards, read = to_host((scores.rewards, scores.read))
        for i, (answer, admission) in enumerate(zip(answers, admissions, strict=True)):
            answer.begin(rewards[i], read[i], scores.errors.get(i), began)
            self.answers[admission.slot] = answer

    def free(self, slots: Iterable[int]) -> None:
        """Let others have these slots and their places."""
        for slot in list(slots):
            self.answers.pop(slot, None)
            del self.places[slot]

    def is_too_small(self, answer: Answer, allowed: int) -> bool:
        """Say whether an answer has no room where all slots are free, or there are more slots than allowed."""
        room = self.room
        return not 0 < room.slots <= allowed or room.tokens < answer.needs or room.answer < answer.limit
