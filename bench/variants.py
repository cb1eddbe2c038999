"""The contestants of `roofline`: this engine as shipped, as built and as it might be built, and its rivals.

Each chooses its widths and waves at the middle values; its rounds then cost what the values of the moment say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from bench.assumptions import ENDS, End, Values, values
from bench.costs import capture_seconds, issued_seconds, launches, ours, prefill, round_seconds
from bench.kernels import Kernel
from bench.parts import BUILT, WHOLE, Engine
from bench.rivals import RIVALS, Pass, Rival, perfect_seconds, vllm, vllm_seconds
from bench.schedule import NEW_TOKENS, Job, Round, Shape, auto_batch, auto_shape, best_shape, bucket_of, schedule


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


BUILT_AS = {
    "first call": 'the defaults, batch_size, width and wave "auto", in an engine\'s first call: it captures its graphs',
    "shipped": "the defaults in a later call, whose memory and graphs are there",
    "tuned": "all prompts in one batch, the best width and waves of the model; the graphs are there",
    "eager": "as `tuned`, with graphs=False",
}
"""The engine as built."""
ALL_PARTS = "all parts"


def contestants(job: Job) -> dict[str, Contestant]:
    """All, by name."""
    calls = {name: a_call(job, name) for name in (*BUILT_AS, ALL_PARTS)}
    mine = [ours_as(job, name, call) for name, call in calls.items()]
    return {c.name: c for c in [*mine, *(rival(job, r) for r in RIVALS)]}


def a_call(job: Job, name: str) -> Batch:
    """Of the contestant of this name, from the first prompt read to the last answer done."""
    if name in ("first call", "shipped"):
        return one_call(job, kept=name == "shipped")
    return one_batch(job, graph=name != "eager", engine=WHOLE if name == ALL_PARTS else BUILT)


def ours_as(job: Job, name: str, call: Batch) -> Contestant:
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

    A bucket's graphs are captured in its first round (a step at its second use, so within the segment); a larger bucket
    than any before moves the buffers, and all graphs are lost. kept: an earlier call left memory and graphs.
    """
    captured: set[int] = set()
    peak = 0
    made = []
    for job, rounds in parts:
        steps = []
        for r in rounds:
            bucket = bucket_of(r.prompts * r.shape.width)
            if bucket > peak:
                captured, peak = set(), bucket
            steps.append(Step(r.happens, _round(job, r), graph=True, captured=not kept and bucket not in captured))
            captured.add(bucket)
        made.append(Batch(job, prefill(job), steps))
    return made


@cache
def one_batch(job: Job, graph: bool = True, engine: Engine = BUILT) -> Batch:
    """All prompts side by side in the best rounds of the middle values, in a call that captures nothing."""

    def cost(prompts: int, shape: Shape) -> float:
        at = Round(1, prompts, shape, job.middle)
        return round_seconds(job.gpu, _round(job, at, padded=graph, engine=engine), graph, values())

    rounds = schedule(job, best_shape(job, cost))
    steps = [Step(r.happens, _round(job, r, padded=graph, engine=engine), graph, False) for r in rounds]
    return Batch(job, prefill(job, engine), steps)


def rival(job: Job, which: Rival) -> Contestant:
    def passes(r: Round) -> list[Pass]:
        return vllm(job, r.prompts, r.shape, r.prefix, which)

    def cost(prompts: int, shape: Shape) -> float:
        at = Round(1, prompts, shape, job.middle)
        return vllm_seconds(job.gpu, passes(at), prompts * shape.width, values(), which)

    rounds = [(r, passes(r)) for r in schedule(job, best_shape(job, cost, which.waves))]
    begin = prefill(job)

    def seconds(given: Values) -> float:
        return perfect_seconds(job.gpu, begin, given) + sum(
            r.happens * vllm_seconds(job.gpu, made, r.prompts * r.shape.width, given, which) for r, made in rounds
        )

    return Contestant(which.name, tokens(job), cache(seconds))


def tokens(job: Job) -> int:
    return job.prompts * NEW_TOKENS


def _round(job: Job, r: Round, padded: bool = True, engine: Engine = BUILT) -> list[Kernel]:
    return ours(job, r.prompts, r.shape.width, r.prefix, padded=padded, engine=engine, wave=r.shape.wave)
