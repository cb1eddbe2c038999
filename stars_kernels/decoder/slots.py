"""The slots: which answer has which, and where its tokens lie in the arenas of both models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.arenas import WORTH_COPYING, Arenas
from stars_kernels.decoder.protocols import Admission, Room
from stars_kernels.decoder.round import Round
from stars_kernels.decoder.transfer import to_host

NO_ROOM = Room(slots=0, tokens=0, answer=0, segment=0)


class Slots:
    """The slots of a round's models, and the places that their answers have."""

    def __init__(self, round: Round, arenas: Arenas | None = None) -> None:
        """arenas: what earlier runs left, and this one leaves; None = its own, which end with it."""
        self.round = round
        self.arenas = Arenas() if arenas is None else arenas
        self._outlived = arenas is not None
        self.room = NO_ROOM
        """The memory that was reserved."""
        self.places: dict[int, tuple[int, int]] = {}
        """(first place, how many) by slot, of those that are taken."""
        self.shares = False
        """Whether an answer that needs more than its share of the places waits for the end of all others."""
        self.race = False
        """Whether some answers are a race's, of which nothing but the prompts is read for good."""
        self._gaps: list[tuple[int, int]] | None = None  # stretches where nothing lies; None = to be found

    @property
    def answers(self) -> dict[int, Answer]:
        """Answers by slot, those first that have it longest."""
        return self.round.answers

    def reserve(self, answers: Iterable[Answer], slots: int, more: bool = False, least: bool = False) -> None:
        """Take the memory for so many of these answers at once, whichever they are.

        more: take it for `slots` answers like the largest, however few there are yet. least: for the first one alone.
        """
        self.room = NO_ROOM
        plans = [(answer, self.round.rule.plan(answer)) for answer in answers]
        needs = sorted(answer.needs for answer, _ in plans)
        slots = slots if more else min(slots, len(needs))
        tokens = plans[0][0].needs if least else slots * needs[-1] if more else sum(needs[-slots:])
        if not self._outlived:
            self.arenas.forget()
        grows = tokens > self.arenas.tokens
        places = tokens + (0 if least else self.arenas.spare) if grows else self.arenas.tokens
        limit = max(answer.max_new_tokens if more else answer.limit for answer, _ in plans)
        room = Room(
            slots=slots,
            tokens=places,
            answer=limit,
            segment=max(limit if plan.race else min(plan.size, limit) for _, plan in plans),
        )
        self._gaps, self.race, self.shares = None, any(plan.race for _, plan in plans), more
        try:
            with self.round.timed("prefill"):
                if grows:
                    self.arenas.grow(places)
                self.round.proposer.reserve(room)
                self.round.scorer.reserve(room)
        except BaseException:  # it may have grown in part
            self.arenas.forget()
            raise
        self.room, self.arenas.tokens = room, places

    def close(self) -> None:
        """Give the memory back, even if a kept error's traceback still refers to it.

        What was decided stays in the arenas that outlive the run.
        """
        self.free(list(self.places))
        self.round.proposer.close()
        self.round.scorer.close()
        self.room = NO_ROOM

    def place(self, answers: Sequence[Answer]) -> list[Admission]:
        """Find free slots and places for the first of these answers, for as many as there are."""
        fresh = not self.places
        found = self._place(answers)
        if fresh and len(found) < min(len(answers), self.room.slots) and len(self.arenas.texts) > len(found):
            for admission in found:  # what was left may lie in the way
                del self.places[admission.slot]
            self.arenas.forget_texts()
            self._gaps = None
            found = self._place(answers)
        return found

    def _place(self, answers: Sequence[Answer]) -> list[Admission]:
        free = (slot for slot in range(self.room.slots) if slot not in self.places)
        found, together = list[Admission](), set[int]()  # the first places of those that are read together
        for answer, slot in zip(answers, free, strict=False):
            if self.shares and self.places and answer.needs > self._share:
                break
            source, shared = self.arenas.longest(answer.prompt[:-1], together)
            start = self._place_for(answer.needs, source, shared)
            if start is None:
                break
            if shared and source in together:
                together.clear()
            self.places[slot] = (start, answer.needs)
            self.arenas.put(start, answer.prompt)
            together.add(start)
            found.append(Admission(slot, start, answer.prompt, answer.request, source, shared))
        return found

    def _read(self, answer: Answer) -> list[int]:
        """Tokens of an answer that both models have read: not the last decided one, and none of a race."""
        return [*answer.prompt, *([] if self.race else answer.tokens[:-1])]

    def _place_for(self, count: int, source: int, shared: int) -> int | None:
        """Find `count` free places for what begins like the `shared` tokens at `source`; None where there are none.

        Where that is nearly all that an answer left there, it goes on behind them. Else, of what was left, that goes
        first which is there longest, and be it the source: what is placed first copies first.
        """
        if shared and self._may_go_on(count, source, shared):
            self._gaps = None
            return source
        while (start := self._first_free(count)) is None:
            left = [place for place, _ in self._left()]
            if not left or all(end - begin < count for begin, end in _gaps(self.places.values(), self.room.tokens)):
                return None
            for place in left[: 1 + len(left) // 16]:
                self.arenas.drop(place)
            self._gaps = None
        return start

    def _may_go_on(self, count: int, source: int, shared: int) -> bool:
        """Say whether nearly all that lies at `source` is shared, an answer left it, and there is room behind it."""
        if len(self.arenas.texts[source]) >= shared + WORTH_COPYING:
            return False
        others = [*self.places.values(), *((place, n) for place, n in self._left() if place != source)]
        return source + count <= self.room.tokens and all(p >= source + count or source >= p + n for p, n in others)

    def _left(self) -> list[tuple[int, int]]:
        """List (first place, how many) of what earlier answers left, those first that are there longest."""
        begun = {place for place, _ in self.places.values()}
        return [(place, len(text)) for place, text in self.arenas.texts.items() if place not in begun]

    def _first_free(self, count: int) -> int | None:
        """Take the first `count` places side by side where nothing lies; return where they begin, None = nowhere."""
        if self._gaps is None:
            self._gaps = _gaps([*self.places.values(), *self._left()], self.room.tokens)
        for i, (begin, end) in enumerate(self._gaps):
            if end - begin >= count:
                self._gaps[i] = (begin + count, end)
                return begin
        return None

    def admit(self, answers: Sequence[Answer], admissions: Sequence[Admission]) -> None:
        """Read the prompts of answers that were placed. Where it raises, no answer has changed."""
        began, found = dict(self.round.seconds), list[tuple[int, float, int, Exception | None]]()
        with self.round.timed("prefill"):
            for group in _in_turn(admissions):
                own = self.round.proposer.admit(group)
                scores = self.round.scorer.admit(group)
                rewards, read = to_host((scores.rewards, scores.read))
                found += [(own[i], rewards[i], read[i], scores.errors.get(i)) for i in range(len(group))]
        for answer, admission, (own_read, reward, scored, error) in zip(answers, admissions, found, strict=True):
            answer.begin(reward, scored, error, began)
            answer.counts.shared = len(answer.prompt) - own_read
            self.answers[admission.slot] = answer

    def free(self, slots: Iterable[int]) -> None:
        """Let others have these slots and their places."""
        for slot in list(slots):
            place, answer = self.places[slot][0], self.answers.pop(slot, None)
            if answer is not None and answer.error is None:
                self.arenas.put(place, self._read(answer))
            else:
                self.arenas.drop(place)
            del self.places[slot]
            self._gaps = None

    def is_too_small(self, answer: Answer, allowed: int) -> bool:
        """Say whether an answer has no room where all slots are free, or there are more slots than allowed."""
        room = self.room
        if not 0 < room.slots <= allowed or room.answer < answer.limit:
            return True
        return answer.needs > (self._share if self.shares else room.tokens)

    @property
    def _share(self) -> int:
        """Places of each slot, where all have as many."""
        return self.room.tokens // self.room.slots


def _gaps(taken: Iterable[tuple[int, int]], places: int) -> list[tuple[int, int]]:
    """List the stretches of places that are not taken, as (first, behind the last); taken: (first, how many)."""
    gaps, begin = list[tuple[int, int]](), 0
    for place, count in sorted(taken):
        if place > begin:
            gaps.append((begin, place))
        begin = place + count
    return [*gaps, (begin, places)] if begin < places else gaps


def _in_turn(admissions: Sequence[Admission]) -> Iterator[list[Admission]]:
    """Part admissions, in their order, so that none copies from one that is read with it."""
    group = list[Admission]()
    for admission in admissions:
        if admission.shared and admission.source in [earlier.place for earlier in group]:
            yield group
            group = []
        group.append(admission)
    if group:
        yield group
