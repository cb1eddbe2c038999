"""The contestants of `roofline`: this engine as shipped, as built and as it might be built, and its rivals.

Each chooses its widths at the middle values; its rounds then cost what the values of the moment say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from bench.assumptions import ENDS, End, Values, values
from bench.costs import capture_seconds, issued_seconds, ours, prefill, round_seconds
from bench.kernels import Kernel
from bench.rivals import RIVALS, Rival, perfect_seconds, vllm, vllm_seconds
from bench.schedule import NEW_TOKENS, Job, Round, auto_batch, auto_width, best_width, bucket_of, schedule


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


NOT_BUILT = {
    "graphs kept": "graphs outlive their batch, all captured before",
    "fused": "and four element-wise kernels a layer instead of 32",
    "waves": "graphs kept, and the reward model reads a round's first columns, then the others of undecided prompts",
}
BUILT = {
    "shipped": 'the defaults: batch_size and width "auto", graphs of one batch',
    "tuned": "all prompts in one batch, the best width of the model, graphs dropped with the batch",
    "eager": "the same with graphs=False",
}


def contestants(job: Job) -> dict[str, Contestant]:
    """All, by name."""
    mine = [shipped(job), tuned(job), eager(job), kept(job), kept(job, fused=True), waves(job)]
    return {c.name: c for c in [*mine, *(rival(job, r) for r in RIVALS)]}


def shipped(job: Job) -> Contestant:
    parts = batches(job)
    return Contestant("shipped", tokens(job), cache(lambda given: sum(b.seconds(given).total for b in parts)))


def batches(job: Job) -> list[Batch]:
    """As decoded by default."""
    size = auto_batch(job)
    sizes = [min(size, job.prompts - done) for done in range(0, job.prompts, size)]
    made = {size: as_built(alone := replace(job, prompts=size), schedule(alone, auto_width(alone))) for size in sizes}
    return [made[size] for size in sizes]


def tuned(job: Job) -> Contestant:
    batch = one_batch(job)
    return Contestant("tuned", tokens(job), cache(lambda given: batch.seconds(given).total))


def one_batch(job: Job) -> Batch:
    return as_built(job, _best_rounds(job, graph=True))


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
    job: Job
    begin: list[Kernel]
    steps: list[Step]

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


def as_built(job: Job, rounds: list[Round]) -> Batch:
    """A batch that begins without a graph, as stars_kernels/hf/proposing/graphs.py does it.

    The first segment of a bucket runs eagerly, the second is captured and replayed; a larger bucket than any before
    moves the buffers, and all graphs are lost.
    """
    seen: set[int] = set()
    captured: set[int] = set()
    peak = 0
    steps = []
    for r in rounds:
        bucket = bucket_of(r.prompts * r.width)
        if bucket > peak:
            seen, captured, peak = set(), set(), bucket
        steps.append(Step(r.happens, _round(job, r), bucket in seen, bucket in seen and bucket not in captured))
        if bucket in seen:
            captured.add(bucket)
        seen.add(bucket)
    return Batch(job, prefill(job), steps)


def eager(job: Job) -> Contestant:
    return _steady(job, "eager", graph=False)


def kept(job: Job, fused: bool = False) -> Contestant:
    return _steady(job, "fused" if fused else "graphs kept", graph=True, fused=fused)


def waves(job: Job) -> Contestant:
    """The first wave of each round is the best for it, and all columns where that is no gain."""
    rounds, begin, found = _best_rounds(job, graph=True), prefill(job), []
    for r in rounds:
        options = [_round(job, r, wave=c) for c in range(1, r.width + 1)]
        found.append((r.happens, min(options, key=lambda kernels: round_seconds(job.gpu, kernels, True, values()))))
    return Contestant("waves", tokens(job), _total(job, begin, found, graph=True))


def rival(job: Job, which: Rival) -> Contestant:
    def cost(prompts: float, width: int, prefix: float) -> float:
        return vllm_seconds(job.gpu, vllm(job, prompts, width, prefix, which), prompts * width, values(), which)

    rounds = [(r, vllm(job, r.prompts, r.width, r.prefix, which)) for r in schedule(job, best_width(job, cost))]
    begin = prefill(job)

    def seconds(given: Values) -> float:
        return perfect_seconds(job.gpu, begin, given) + sum(
            r.happens * vllm_seconds(job.gpu, passes, r.prompts * r.width, given, which) for r, passes in rounds
        )

    return Contestant(which.name, tokens(job), cache(seconds))


def tokens(job: Job) -> int:
    return job.prompts * NEW_TOKENS


@cache
def _best_rounds(job: Job, graph: bool, fused: bool = False) -> list[Round]:
    """At the best width of the middle values."""

    def cost(prompts: float, width: int, prefix: float) -> float:
        kernels = ours(job, prompts, width, prefix, fused_elementwise=fused, padded=graph)
        return round_seconds(job.gpu, kernels, graph, values())

    return schedule(job, best_width(job, cost))


def _round(job: Job, r: Round, **how: Any) -> list[Kernel]:
    return ours(job, r.prompts, r.width, r.prefix, **{"padded": True} | how)


def _steady(job: Job, name: str, graph: bool, fused: bool = False) -> Contestant:
    rounds = _best_rounds(job, graph, fused)
    found = [(r.happens, _round(job, r, padded=graph, fused_elementwise=fused)) for r in rounds]
    return Contestant(name, tokens(job), _total(job, prefill(job, fused), found, graph))


def _total(
    job: Job, begin: list[Kernel], rounds: Iterable[tuple[float, list[Kernel]]], graph: bool
) -> Callable[[Values], float]:
    @cache
    def seconds(given: Values) -> float:
        return issued_seconds(job.gpu, begin, False, given) + sum(
            happens * round_seconds(job.gpu, kernels, graph, given) for happens, kernels in rounds
        )

    return seconds
