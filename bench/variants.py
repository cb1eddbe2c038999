"""The contestants of `roofline`: this engine as shipped, as built and as it might be built, and its rivals.

Each chooses its widths at the middle values; its rounds then cost what the values of the moment say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from bench.assumptions import ENDS, End, Values, values
from bench.costs import capture_seconds, issued_seconds, launches, ours, prefill, round_seconds
from bench.kernels import Kernel
from bench.rivals import RIVALS, Pass, Rival, perfect_seconds, vllm, vllm_seconds
from bench.schedule import NEW_TOKENS, Job, Round, auto_batch, auto_shape, best_width, bucket_of, schedule


class Band(NamedTuple):
    """What the slow end, the middle and the fast end of the assumptions give; a speed or a ratio of speeds."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Contestant:
    name: str
    tokens: int
    seconds: Callable[[Values], float]
    """Until all answers are done."""

    def speed(self, given: Values) -> float:
        """Aligned tokens a second."""
        return self.tokens / self.seconds(given)

    @property
    def band(self) -> Band:
        low, middle, high = (self.speed(values(end, end)) for end in ("slow", "middle", "fast"))
        return Band(low, middle, high)

    def against(self, rival: Contestant) -> Band:
        """Speed over the rival's: the same GPU for both, and whatever touches one of them alone at opposite ends."""

        def ratios(mine: End, theirs: End) -> list[float]:
            return [self.speed(values(end, mine)) / rival.speed(values(end, theirs)) for end in ENDS]

        middle = self.speed(values()) / rival.speed(values())
        return Band(min(ratios("slow", "fast")), middle, max(ratios("fast", "slow")))


WAVES = (1, 2, 4, 8)
"""Columns scored at once, of which the best are taken."""
BUILT = {
    "first call": 'the defaults, batch_size and width "auto", in the first call of an engine: it captures its graphs',
    "shipped": "the defaults in a later call, whose memory and graphs are there",
    "tuned": "all prompts in one batch, the best width of the model; the graphs are there, the device judges",
    "waves": "as `tuned`, but a round in which that is faster is scored in waves (`wave=`), which the host judges",
    "eager": "as `tuned`, with graphs=False",
}
NOT_BUILT = {
    "pivots": "as `waves`, and segment_sample searches 8 pivots a pass, so that a search takes a third of the time",
}


def contestants(job: Job) -> dict[str, Contestant]:
    """All, by name."""
    mine = [
        defaults(job, "first call", kept=False), defaults(job, "shipped", kept=True),
        steady(job, "tuned"), waves(job, "waves"), steady(job, "eager", graph=False), waves(job, "pivots", PIVOTS),
    ]  # fmt: skip
    return {c.name: c for c in [*mine, *(rival(job, r) for r in RIVALS)]}


def defaults(job: Job, name: str, kept: bool) -> Contestant:
    call = one_call(job, kept)
    return Contestant(name, tokens(job), cache(lambda given: call.seconds(given).total))


@cache
def one_call(job: Job, kept: bool) -> Batch:
    """With the defaults, one batch after the other."""
    return Batch.joined(as_built(batches(job), kept))


@cache
def batches(job: Job) -> list[tuple[Job, list[Round]]]:
    """As decoded by default."""
    size = auto_batch(job)
    sizes = [min(size, job.prompts - done) for done in range(0, job.prompts, size)]
    made = {size: (alone := replace(job, prompts=size), schedule(alone, auto_shape(alone))) for size in set(sizes)}
    return [made[size] for size in sizes]


class Spent(NamedTuple):
    """Seconds of a batch; `captures` beside the rounds that then replay them."""

    prefill: float
    rounds: float
    captures: float

    @property
    def total(self) -> float:
        return sum(self)


class Step(NamedTuple):
    happens: float
    kernels: list[Kernel]
    graph: bool
    captured: bool  # in this round, before it


@dataclass(frozen=True)
class Batch:
    """What is decoded: prompts that are read, then rounds."""

    job: Job
    begin: list[Kernel]
    steps: list[Step]

    @staticmethod
    def joined(parts: Sequence[Batch]) -> Batch:
        """One after the other."""
        return Batch(parts[0].job, [k for b in parts for k in b.begin], [s for b in parts for s in b.steps])

    def seconds(self, given: Values) -> Spent:
        gpu = self.job.gpu
        return Spent(
            issued_seconds(gpu, self.begin, False, given),
            sum(s.happens * round_seconds(gpu, s.kernels, s.graph, given) for s in self.steps),
            sum(s.happens * capture_seconds(s.kernels, given) for s in self.steps if s.captured),
        )

    @property
    def counts(self) -> dict[str, float]:
        """Expected rounds: all, those without a graph, those that capture one."""
        return {
            "rounds": sum(s.happens for s in self.steps),
            "eager": sum(s.happens for s in self.steps if not s.graph),
            "capturing": sum(s.happens for s in self.steps if s.captured),
        }

    @property
    def launched(self) -> tuple[float, float]:
        """Launches that the GPU runs, and those that the host issues: a graph's are one."""
        begin = launches(self.begin)
        runs = sum(s.happens * launches(s.kernels) for s in self.steps)
        return begin + runs, begin + sum(s.happens * launches(s.kernels, s.graph) for s in self.steps)


def as_built(parts: Sequence[tuple[Job, list[Round]]], kept: bool = False) -> list[Batch]:
    """The batches of a call, as stars_kernels/hf/proposing/graphs.py runs them.

    A bucket's graphs are captured in its first round (a step at its second use, so within the segment); a larger
    bucket than any before moves the buffers, and all graphs are lost. kept: an earlier call like it has left memory and
    graphs.
    """
    captured: set[int] = set()
    peak = 0
    made = []
    for job, rounds in parts:
        steps = []
        for r in rounds:
            bucket = bucket_of(r.prompts * r.width)
            if bucket > peak:
                captured, peak = set(), bucket
            steps.append(Step(r.happens, _round(job, r), graph=True, captured=not kept and bucket not in captured))
            captured.add(bucket)
        made.append(Batch(job, prefill(job), steps))
    return made


def steady(job: Job, name: str, graph: bool = True) -> Contestant:
    batch = one_batch(job, graph)
    return Contestant(name, tokens(job), cache(lambda given: batch.seconds(given).total))


@cache
def one_batch(job: Job, graph: bool = True) -> Batch:
    """All prompts side by side, in a call that captures nothing."""
    steps = [Step(r.happens, _round(job, r, padded=graph), graph, False) for r in _best_rounds(job, graph)]
    return Batch(job, prefill(job), steps)


PIVOTS = 1 / 3
"""Of the time that a search takes, where 8 pivots share a pass: 10 passes of 3 bits each instead of 30."""


def waves(job: Job, name: str, search: float = 1.0) -> Contestant:
    """The waves of each round are the best for it: all columns at once where others are no gain.

    search: how long a search of segment_sample takes, of what it does as built.
    """
    steps = []
    for r in _best_rounds(job):
        options = [_round(job, r, wave=w) for w in waves_of(r.width)]
        best = min(options, key=lambda k: round_seconds(job.gpu, k, True, values()))
        steps.append(Step(r.happens, best, True, False))
    batch = Batch(job, prefill(job), steps)

    def seconds(given: Values) -> float:
        return batch.seconds(replace(given, search_seconds=search * given.search_seconds)).total

    return Contestant(name, tokens(job), cache(seconds))


def waves_of(width: int) -> list[int]:
    return [*(w for w in WAVES if w < width), width]


def rival(job: Job, which: Rival) -> Contestant:
    def cost(prompts: float, width: int, prefix: float) -> float:
        return vllm_seconds(job.gpu, vllm(job, prompts, width, prefix, which), prompts * width, values(), which)

    def best(r: Round) -> list[Pass]:
        """With the best waves for it, where it has any."""
        options = [
            vllm(job, r.prompts, r.width, r.prefix, which, wave)
            for wave in (waves_of(r.width) if which.waves else [r.width])
        ]
        return min(options, key=lambda p: vllm_seconds(job.gpu, p, r.prompts * r.width, values(), which))

    rounds = [(r, best(r)) for r in schedule(job, best_width(job, cost))]
    begin = prefill(job)

    def seconds(given: Values) -> float:
        return perfect_seconds(job.gpu, begin, given) + sum(
            r.happens * vllm_seconds(job.gpu, passes, r.prompts * r.width, given, which) for r, passes in rounds
        )

    return Contestant(which.name, tokens(job), cache(seconds))


def tokens(job: Job) -> int:
    return job.prompts * NEW_TOKENS


@cache
def _best_rounds(job: Job, graph: bool = True) -> list[Round]:
    """At the best width of the middle values."""

    def cost(prompts: float, width: int, prefix: float) -> float:
        kernels = ours(job, prompts, width, prefix, padded=graph)
        return round_seconds(job.gpu, kernels, graph, values())

    return schedule(job, best_width(job, cost))


def _round(job: Job, r: Round, **how: Any) -> list[Kernel]:
    return ours(job, r.prompts, r.width, r.prefix, **{"padded": True, "wave": r.wave} | how)
