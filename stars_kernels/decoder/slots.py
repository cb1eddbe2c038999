"""The slots: which answer has which, and where its tokens lie in the arenas of both models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.prefixes import shared_length
from stars_kernels.decoder.protocols import Admission, Room
from stars_kernels.decoder.round import Round
from stars_kernels.decoder.transfer import to_host

NO_ROOM = Room(slots=0, tokens=0, answer=0, segment=0)
WORTH_COPYING = 32
"""Tokens: with fewer, a prompt had better be read together with others."""


@dataclass
class Arenas:
    """The places for tokens that both models have, and what earlier answers left there."""

    tokens: int = 0
    """Places; 0 = none are known."""
    spare: int = 0
    """Places to take beyond those that a run needs, so that more of what was left stays."""
    left: dict[int, list[int]] = field(default_factory=dict)
    """By first place, tokens that an answer which has ended left there, for as long as nobody takes the places; those
    first that are there longest."""

    def forget(self) -> None:
        """Know of no places any more, and so of nothing that lies there."""
        self.tokens = 0
        self.left.clear()


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
        tokens = slots * needs[-1] if more else plans[0][0].needs if least else sum(needs[-slots:])
        if tokens > self.arenas.tokens or not self._outlived:
            self.arenas.forget()
            self.arenas.tokens = tokens + (0 if least else self.arenas.spare)
        limit = max(answer.max_new_tokens if more else answer.limit for answer, _ in plans)
        room = Room(
            slots=slots,
            tokens=self.arenas.tokens,
            answer=limit,
            segment=max(limit if plan.race else min(plan.size, limit) for _, plan in plans),
        )
        self._race, self.shares = any(plan.race for _, plan in plans), more
        with self.round.timed("prefill"):
            self.round.proposer.reserve(room)
            self.round.scorer.reserve(room)
        self.room = room

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
        free = (slot for slot in range(self.room.slots) if slot not in self.places)
        found, group = list[Admission](), 0  # where those begin that are read together
        for answer, slot in zip(answers, free, strict=False):
            if self.shares and self.places and answer.needs > self._share:
                break
            source, shared = self._beginning_of(list(answer.prompt[:-1]), found[:group], found[group:])
            start = self._place_for(answer.needs, source, shared)
            if start is None:
                break
            if shared and source in [earlier.place for earlier in found[group:]]:
                group = len(found)
            self._overwrite(start, answer.needs)
            self.places[slot] = (start, answer.needs)
            found.append(Admission(slot, start, answer.prompt, answer.request, source, shared))
        return found

    def _beginning_of(
        self, prompt: list[int], before: Sequence[Admission], group: Sequence[Admission]
    ) -> tuple[int, int]:
        """Where the longest beginning of a prompt lies already, and its tokens.

        before: those that are read before it. group: those that would be read with it; to copy from one of them, it has
        to wait, which a few tokens more are not worth.
        """
        together = {admission.place: list(admission.prompt) for admission in group}
        apart = dict(self.arenas.left)
        apart |= {self.places[slot][0]: self._read(answer) for slot, answer in self.answers.items()}
        apart |= {admission.place: list(admission.prompt) for admission in before}
        best = (0, 0)
        for texts, more in ((apart, 1), (together, WORTH_COPYING)):
            for place, text in texts.items():
                end = best[1] + more  # how long it has to be
                if text[:end] == prompt[:end] and end <= len(prompt):
                    best = (place, shared_length(text, prompt))
        return best if best[1] >= WORTH_COPYING else (0, 0)

    def _read(self, answer: Answer) -> list[int]:
        """Tokens of an answer that both models have read: not the last decided one, and none of a race."""
        return [*answer.prompt, *([] if self._race else answer.tokens[:-1])]

    def _overwrite(self, start: int, count: int) -> None:
        """Forget what was left in these places."""
        left = self.arenas.left
        for place in [p for p, text in left.items() if p < start + count and start < p + len(text)]:
            del left[place]

    def _place_for(self, count: int, source: int, shared: int) -> int | None:
        """Find `count` free places for what begins like the `shared` tokens at `source`; None where there are none.

        Where that is nearly all that was left there, it goes on behind them. Else, of what was left, that goes first
        which is there longest.
        """
        taken, left = list(self.places.values()), {p: len(text) for p, text in self.arenas.left.items()}
        if shared and left.get(source, self.room.tokens) < shared + WORTH_COPYING:
            others = [*taken, *((p, length) for p, length in left.items() if p != source)]
            if _is_free(source, count, others, self.room.tokens):
                return source
            left[source] = left.pop(source)  # to the end
        for gone in range(len(left) + 1):
            start = _first_free(count, [*taken, *list(left.items())[gone:]], self.room.tokens)
            if start is not None:
                return start
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
            place, _ = self.places.pop(slot)
            answer = self.answers.pop(slot, None)
            if answer is not None and answer.error is None:
                self.arenas.left[place] = self._read(answer)

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


def _first_free(count: int, taken: Iterable[tuple[int, int]], places: int) -> int | None:
    """Where the first stretch of `count` of the places begins that are not taken; None where there is none.

    taken: (first place, how many).
    """
    start = 0
    for place, length in sorted(taken):
        if place - start >= count:
            return start
        start = place + length
    return start if places - start >= count else None


def _is_free(start: int, count: int, taken: Iterable[tuple[int, int]], places: int) -> bool:
    return start + count <= places and all(p >= start + count or start >= p + length for p, length in taken)


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
