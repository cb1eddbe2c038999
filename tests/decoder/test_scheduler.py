"""Slots at random: what is decided of an answer does not depend on who else has a slot, nor on what fails meanwhile."""

import itertools
import random
import warnings

import pytest
import torch

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.arenas import WORTH_COPYING, Arenas
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.protocols import Room, Scores
from stars_kernels.decoder.round import Round
from stars_kernels.decoder.rules import BestOf, BlockBestOf, SpeculativeRejection, Stars
from stars_kernels.decoder.scheduler import MAX_PASSED
from stars_kernels.decoder.slots import Slots
from stars_kernels.ops.philox import request_key
from tests.decoder.enumerable import DEPTH, EOS, Scorer, Table, make_world
from tests.runs import run_of

CASES = 300
RULES = (
    Stars(segment_size=2, max_attempts=4, reward_threshold=0.5, beta=0.5),
    Stars(segment_size=1, max_attempts=3, reward_threshold=0.8, accept="hard"),
    BestOf(3),
    BlockBestOf((3, 1), segment_size=2),
)


@pytest.fixture(scope="module")
def world():
    return make_world()


class Broken(Exception):
    """What a model raises that has a bug."""


class Faults:
    """Wraps methods of a proposer or a scorer: each call may run out of memory, or fail, before its work is done."""

    def __init__(self, rng, out_of_memory, broken):
        self.rng, self.out_of_memory, self.broken = rng, out_of_memory, broken
        self.raised = {torch.OutOfMemoryError: 0, Broken: 0}

    def into(self, side, names):
        for name in names:
            setattr(side, name, self._around(getattr(side, name)))
        return side

    def _around(self, method):
        def call(*args):
            chance = self.rng.random()
            if chance < self.out_of_memory + self.broken:
                kind = torch.OutOfMemoryError if chance < self.out_of_memory else Broken
                self.raised[kind] += 1
                raise kind("CUDA out of memory" if kind is torch.OutOfMemoryError else "a bug")
            return method(*args)

        return call


class Places(Table):
    """A table that gives its memory back."""

    def release(self):
        pass

    def close(self):
        self.length = self.value = self.tail = None


def scorer_of(table):
    scorer = Scorer(table)
    scorer.release = scorer.close = lambda: None
    return scorer


def answers_of(requests):
    return [Answer(request_key(0, i), [1] * prompt, limit, max_new_tokens=DEPTH) for i, prompt, limit in requests]


def told(answer):
    segments = [(s.rewards, s.lengths, s.chosen, s.outcome) for s in answer.segments]
    return answer.tokens, answer.reward, answer.finish_reason, segments


class Alone:
    """What each request is answered alone, one attempt at a time."""

    def __init__(self, world):
        self.world, self.known = world, {}

    def __call__(self, rule, request):
        key = (repr(rule), request[0], request[2])
        if key not in self.known:
            (answer,), table = answers_of([request]), Places(self.world)
            config = StarsConfig(rule=rule, max_new_tokens=DEPTH, width=1, wave=1, top_k=None)
            run_of(table, scorer_of(table), config, [answer], eos=(EOS,)).run()
            self.known[key] = told(answer)
        return self.known[key]


def any_config(rng):
    return StarsConfig(
        rule=rng.choice(RULES),
        max_new_tokens=DEPTH,
        batch_size=rng.randint(1, 5),
        width=rng.choice([1, 2, 4, "auto"]),
        wave=rng.choice([1, 2, "auto"]),
        top_k=None,
    )


def faulty_sides(world, faults):
    """A proposer and a scorer of one table, all of whose steps may fail."""
    table = Places(world)
    scorer = faults.into(scorer_of(table), ("reserve", "admit", "open", "score", "commit"))
    return faults.into(table, ("reserve", "admit", "propose", "commit")), scorer


def test_any_slots_and_any_faults(world):
    rng, alone, seen = random.Random(0), Alone(world), {"short": 0, "broken": 0, "fewer": 0, "overtaken": 0}
    for case in range(CASES):
        config = any_config(rng)
        ids = rng.sample(range(16), rng.randint(1, 12))
        requests = [(i, rng.randint(1, 9), rng.randint(1, DEPTH)) for i in ids]
        expected = [alone(config.rule, request) for request in requests]
        faults = Faults(rng, *rng.choice([(0, 0), (0.1, 0), (0.3, 0), (0, 0.03), (0.1, 0.03)]))
        proposer, scorer = faulty_sides(world, faults)
        answers = answers_of(requests)
        run = run_of(proposer, scorer, config, answers, eos=(EOS,))
        order = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for changed in run.rounds():
                assert 0 < len(changed) and len(run.active) <= config.batch_size
                order += [answer for answer in changed if not answer.active]
                at = [answers.index(answer) for answer in changed]
                assert at == sorted(at)  # those first that have their slot longest
        assert sorted(map(id, order)) == sorted(map(id, answers))  # each ends once
        assert not run.waiting and not run.active
        for answer, truth in zip(answers, expected, strict=True):
            if answer.error is None:
                assert told(answer) == truth, case
            else:  # only where something raised that it could not do without
                assert faults.raised[Broken] or faults.raised[torch.OutOfMemoryError]
                assert isinstance(answer.error.__cause__, Broken | torch.OutOfMemoryError)
                assert answer.tokens == truth[0][: len(answer.tokens)]
        if not faults.broken and not faults.out_of_memory:
            assert [answer.error for answer in answers] == [None] * len(answers)
        seen["short"] += faults.raised[torch.OutOfMemoryError] > 0
        seen["broken"] += faults.raised[Broken] > 0
        seen["fewer"] += run.limits.batch_size is not None
        seen["overtaken"] += [answers.index(answer) for answer in order] != list(range(len(answers)))
    assert min(seen.values()) > CASES // 20, seen


def test_arrivals_and_drops_at_random(world):
    """In an open run, requests come at any time and some are dropped, while memory runs out and models fail."""
    rng, alone, seen = random.Random(3), Alone(world), {"short": 0, "broken": 0, "dropped": 0, "begun and dropped": 0}
    for case in range(CASES):
        config = any_config(rng)
        requests = [(i, rng.randint(1, 9), rng.randint(1, DEPTH)) for i in rng.sample(range(16), rng.randint(1, 12))]
        faults = Faults(rng, *rng.choice([(0, 0), (0.1, 0), (0.2, 0), (0, 0.03), (0.1, 0.03)]))
        proposer, scorer = faulty_sides(world, faults)
        answers = answers_of(requests)
        run, coming, dropped = run_of(proposer, scorer, config, [], eos=(EOS,)), list(answers), set()
        run.open = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            while coming or run.waiting or run.active:
                if coming and rng.random() < 0.5:
                    run.add(coming.pop(0))
                there = [*run.waiting, *(answer for answer in run.active.values() if answer.active)]
                if there and rng.random() < 0.1:
                    answer = rng.choice(there)
                    seen["begun and dropped"] += bool(answer.tokens)
                    run.drop(answer, "cancelled")
                    dropped.add(id(answer))
                run.step()
                assert len(run.active) <= config.batch_size
        run.close()
        for answer, request in zip(answers, requests, strict=True):
            truth = alone(config.rule, request)
            assert answer.tokens == truth[0][: len(answer.tokens)], case
            if id(answer) in dropped:
                assert answer.finish_reason == "cancelled"
            elif answer.error is None:
                assert told(answer) == truth, case
            else:  # only where something raised that it could not do without
                assert isinstance(answer.error.__cause__, Broken | torch.OutOfMemoryError)
        seen["short"] += faults.raised[torch.OutOfMemoryError] > 0
        seen["broken"] += faults.raised[Broken] > 0
        seen["dropped"] += bool(dropped)
    assert min(seen.values()) > CASES // 20, seen


class Sides:
    """A round of models that take no memory."""

    def __init__(self):
        self.answers, self.seconds = {}, {}


def test_places_are_side_by_side_and_apart():
    rng = random.Random(1)
    for _ in range(300):
        needs = [rng.randint(1, 30) for _ in range(rng.randint(1, 20))]
        count = rng.randint(1, 6)
        slots = Slots(Sides())
        slots.room = Room(count, sum(sorted(needs)[-count:]), 0, 0)
        waiting = [Answer(0, [0] * need, 0) for need in needs]
        while waiting or slots.places:
            found = slots.place(waiting)
            taken = sorted(slots.places.values())
            assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(taken))
            assert not taken or taken[-1][0] + taken[-1][1] <= slots.room.tokens
            assert [len(admission.prompt) for admission in found] == [answer.needs for answer in waiting[: len(found)]]
            assert found or slots.places  # what is first in turn has room as soon as all others have left
            waiting = waiting[len(found) :]
            slots.free(rng.sample(sorted(slots.places), rng.randint(1, len(slots.places))))


class Memory:
    """A side of a round that reads into cells, and checks that what it is told to copy is what it would read."""

    device = torch.device("cpu")

    def __init__(self, cells):
        self.cells, self.broken, self.copied = cells, False, 0

    def reserve(self, room):
        if room.tokens > len(self.cells):
            self.cells[:] = [None] * room.tokens

    def admit(self, admissions):
        for a in admissions:
            self.cells[a.place : a.place + a.shared] = self.cells[a.source : a.source + a.shared]
            self.copied += a.shared
        for a in admissions:
            assert self.cells[a.place : a.place + a.shared] == a.prompt[: a.shared] and a.shared < len(a.prompt)
            self.cells[a.place + a.shared : a.place + len(a.prompt)] = a.prompt[a.shared :]
            if self.broken:
                raise Broken
        return [len(a.prompt) - a.shared for a in admissions]

    def close(self):
        pass


class MemoryOfRewards(Memory):
    def admit(self, admissions):
        read = torch.tensor(super().admit(admissions))
        return Scores(torch.zeros(len(admissions), dtype=torch.float64), read)


class SidesWithMemory(Round):
    def __init__(self, cells):
        super().__init__(Memory(cells[0]), MemoryOfRewards(cells[1]), BestOf(1), {}, ())


@pytest.mark.parametrize("stays", [False, True])
def test_what_is_shared_lies_where_it_is_said_to(stays):
    """In runs at random of one pair of arenas, some of which fail or end early.

    stays: whether what is there stays where the arenas grow.
    """
    rng, copied, lost = random.Random(2), 0, 0
    cells = ([], [])

    def enlarge(before, after):
        for half in cells:
            half += [None] * (after - before)

    arenas = Arenas(enlarge if stays else None)
    texts = [[rng.randint(0, 1) for _ in range(rng.randint(30, 70))] for _ in range(4)]
    for _ in range(400):
        arenas.spare = rng.choice([0, 100, 400])
        if rng.random() < 0.02:  # another has written over it
            arenas.forget()
            cells[rng.randint(0, 1)][:] = []
        sides = SidesWithMemory(cells)
        slots = Slots(sides, arenas)
        chosen = [rng.choice([*texts[:4], *texts[-8:]]) for _ in range(rng.randint(1, 8))]
        prompts = [[*text[: rng.choice([150, 150, rng.randint(1, 70)])], rng.randint(0, 1)] for text in chosen]
        waiting = [Answer(0, prompt, 6) for prompt in prompts]
        slots.reserve(waiting, rng.randint(1, 4))
        for _ in range(rng.choice([1, 3, 99])):
            found = slots.place(waiting)
            sides.proposer.broken, sides.scorer.broken = rng.random() < 0.05, rng.random() < 0.05
            try:
                slots.admit(waiting[: len(found)], found)
            except Broken:
                slots.free(admission.slot for admission in found)
            waiting = waiting[len(found) :]
            for slot, answer in sides.answers.items():
                tokens = [rng.randint(0, 1) for _ in range(rng.randint(0, min(3, 6 - len(answer.tokens))))]
                start = slots.places[slot][0] + len(answer.prompt) + len(answer.tokens)
                answer.tokens += tokens
                for half in cells:
                    half[start : start + len(tokens)] = tokens
            ended = [slot for slot in sides.answers if rng.random() < 0.5]
            texts += [[*sides.answers[slot].prompt, *sides.answers[slot].tokens][:150] for slot in ended]
            slots.free(ended)
            if not waiting and not slots.places:
                break
        slots.close()
        assert not slots.places and not sides.answers
        room = sorted((place, len(text)) for place, text in arenas.texts.items())
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(room))
        for place, text in arenas.texts.items():
            assert all(half[place : place + len(text)] == text for half in cells)
        copied += sides.proposer.copied
        lost += bool(waiting)
    assert copied > 400 * WORTH_COPYING and lost > 40


def test_an_open_run_takes_memory_for_fewer_where_there_is_too_little(world):
    """Also where one answer alone came first: the memory would have been for all slots."""
    config = StarsConfig(rule=RULES[0], max_new_tokens=DEPTH, batch_size=8, top_k=None)
    table = Places(world)
    reserve = table.reserve

    def scarce(room):
        if room.slots > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        reserve(room)

    table.reserve = scarce
    run = run_of(table, scorer_of(table), config, [], eos=(EOS,))
    run.open = True
    alone, requests = Alone(world), [(i, 1 + i, DEPTH) for i in range(6)]
    answers = answers_of(requests)
    with pytest.warns(RuntimeWarning, match="out of memory as 8 prompts were admitted: going on with batch_size=4"):
        for answer in answers:
            run.add(answer)
            run.step()
            assert len(run.active) <= 2
        run.run()
    assert run.limits.batch_size == 2
    assert list(map(told, answers)) == [alone(config.rule, request) for request in requests]


def test_a_larger_answer_has_its_turn_in_an_open_run(world):
    """It waits for the end of those before it; from then on there is room for more like it."""
    config = StarsConfig(rule=RULES[0], max_new_tokens=DEPTH, batch_size=2, top_k=None)
    table, rooms = Places(world), []
    reserve = table.reserve
    table.reserve = lambda room: (rooms.append(room), reserve(room))
    run = run_of(table, scorer_of(table), config, [], eos=(EOS,))
    run.open, run.slots = True, 2
    answers = answers_of([(0, 2, DEPTH), (1, 2, DEPTH), (2, 40, DEPTH), (3, 40, DEPTH), (4, 2, DEPTH)])
    for answer in answers:
        run.add(answer)
    run.run()
    assert [room.tokens for room in rooms] == [2 * (2 + DEPTH), 2 * (40 + DEPTH)] or rooms[0].tokens == 2 * (40 + DEPTH)
    assert [answer.error for answer in answers] == [None] * 5


def test_a_short_turn_is_not_passed_over_for_ever(world):
    """In a race, whose last turn is shorter, while others come without end to an open run for the turn before it."""
    rule = SpeculativeRejection(2, segment_size=3, keep=0.9)  # a turn of 3 tokens, and one of 1
    config = StarsConfig(rule=rule, max_new_tokens=DEPTH, batch_size=50, width=2, top_k=None)
    answers, table = answers_of([(i, 1, DEPTH) for i in range(40)]), Places(world)
    run, passed = run_of(table, scorer_of(table), config, [], eos=(EOS,)), []
    run.open, run.slots = True, 50
    for answer in answers:
        run.add(answer)
        run.step()  # which admits it
        run.step()
        passed += [other.passed for other in run.active.values()]
    assert max(passed) == MAX_PASSED and sum(not answer.active for answer in answers) > 30
    run.run()
    alone = Alone(world)
    assert list(map(told, answers)) == [alone(rule, (i, 1, DEPTH)) for i in range(40)]
