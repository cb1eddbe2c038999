"""What "auto" is: how many prompts and attempts to decode side by side, and how many attempts to score before judging.

All change speed only, and no clock is read.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple, Protocol

MAX_SLOTS = 256
"""Where the steps of one attempt per prompt are bound by arithmetic on a GPU, about: more rows gain nothing."""
SLOT_GAIN = 1.2
"""Twice as many slots are worth their memory, and that each answer takes longer, if they decode so much faster."""
CHOICES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64)

BANDWIDTH_SHARE, FLOPS_SHARE = 0.8, 0.6  # of the datasheet's that a program gets
HOST_SECONDS = 2e-3  # a round's bookkeeping, where a GPU waits for it; half as much for each further wave
ASKED_SECONDS = 5e-3  # assumed, of a call of a reward function, and again of each answer in it
ISSUE_SECONDS = 18e-6  # the host takes for a launch outside of a CUDA graph
LAUNCH_SECONDS = 2.8e-6  # the GPU takes for a launch at least, the gap before it included
RIDGE = 2.64  # the exponent that joins bytes and operations: where both take as long, a product takes 1.3 times that
LAYER_LAUNCHES, STEP_LAUNCHES = 12, 29  # of a step, in each layer and outside: Llama's, fused
MERGED_LAUNCHES = 9  # of a layer whose products are merged where they read the same
TOKEN_STATES = 22  # hidden states' worth that a layer's element-wise kernels move for a token: Llama-3-8B, fused
LOGIT_PASSES = 3  # over a row's logits: written once, read twice


class Cost(Protocol):
    """What a round costs, in a unit of its own: only ratios count. More rows never cost less. It can be hashed."""

    @property
    def waves(self) -> bool:
        """Whether a round may be scored in several waves."""

    def sample(self, rows: int) -> float:
        """Return the cost of sampling a round of `rows` rows."""

    def score(self, rows: float) -> float:
        """Return the cost of scoring a wave of `rows` rows, on average."""

    def judge(self, later: float | None) -> float:
        """Return the cost of judging a round besides; later: waves behind the first, on average; None = none."""

    def __hash__(self) -> int: ...


class Shape(NamedTuple):
    """How a round is laid out.

    width: attempts of a slot side by side. wave: how many of them are scored before the rule judges them.
    """

    width: int
    wave: int


@dataclass(frozen=True)
class CpuCost:
    """A round on a CPU, in steps of one row.

    Between what two machines of 2 cores took, with a 135M model in fp32 on packed weights as language and as reward
    model. A step of 1, 8, 16 and 64 rows took 32, 38, 47 and 137 ms on one, 59, 65, 114 and 228 ms on the other (of up
    to 8 rows, one prompt's). A row and token to score took 1/16 of a step of one row there and 1/65 here, where a wave
    took half a step more.

    segment_size: tokens of a row. reads: whether a reward model reads them, or a function is asked.
    """

    segment_size: int
    reads: bool = True

    @property
    def waves(self) -> bool:
        return self.reads

    def sample(self, rows: int) -> float:
        return self.segment_size * (1 + rows / 30)

    def score(self, rows: float) -> float:
        return 0.5 + self.segment_size * rows / 30 if self.reads else 0.0

    def judge(self, later: float | None) -> float:
        """Nothing: who judges is who samples."""
        return 0.0


@dataclass(frozen=True)
class ModelSize:
    """What a forward of one model reads and computes.

    weights: bytes that a forward reads. parameters: behind them; a token takes two operations for each. kv_bytes: of a
    token's keys and values, all layers. state_bytes: of a token's hidden state. logits_bytes: of a token's logits, 0
    where there are none. layer_launches: of a forward, in each layer.
    """

    weights: float
    parameters: float
    layers: int
    kv_bytes: float
    state_bytes: float
    logits_bytes: float = 0.0
    layer_launches: int = LAYER_LAUNCHES


@dataclass(frozen=True)
class GpuCost:
    """Seconds of a round on a GPU, modelled from each forward's bytes, operations and launches.

    A short form of the model of `python -m bench roofline`.

    The prompts' prefixes are left out: they are read whatever the width. bandwidth, flops: the datasheet's bytes and
    operations per second. graphs: whether forwards run as CUDA graphs. asks: whether a reward function is asked.
    """

    model: ModelSize
    rewards: tuple[ModelSize, ...]
    segment_size: int
    bandwidth: float
    flops: float
    graphs: bool = True
    asks: bool = False

    @property
    def waves(self) -> bool:
        return self.asks or bool(self.rewards)

    def sample(self, rows: int) -> float:
        """One forward for the last tokens of the segments before, and segment_size - 1 steps."""
        last, step = self._forward(self.model, 0, 1), self._forward(self.model, rows, 1)
        return last + (self.segment_size - 1) * step

    def score(self, rows: float) -> float:
        """A forward of each reward model."""
        asked = ASKED_SECONDS * (1 + rows) if self.asks else 0.0
        return asked + sum(self._forward(rm, rows, self.segment_size) for rm in self.rewards)

    def judge(self, later: float | None) -> float:
        """Nothing where the device judges by itself: a round in one wave, in CUDA graphs, of models that it runs."""
        if later is None and self.graphs and not self.asks:
            return 0.0
        return HOST_SECONDS * (1 + (later or 0.0) / 2)

    def _forward(self, size: ModelSize, rows: float, tokens: int) -> float:
        """Seconds for `tokens` new tokens of each row."""
        bandwidth, new = BANDWIDTH_SHARE * self.bandwidth, rows * tokens
        moved = size.weights + rows * self.segment_size * size.kv_bytes + new * LOGIT_PASSES * size.logits_bytes
        states = new * TOKEN_STATES * size.layers * size.state_bytes
        launches = size.layer_launches * size.layers + STEP_LAUNCHES
        limits = moved / bandwidth, 2 * new * size.parameters / (FLOPS_SHARE * self.flops)
        products = sum(limit**RIDGE for limit in limits) ** (1 / RIDGE)
        seconds = products + states / bandwidth + LAUNCH_SECONDS * launches
        return seconds if self.graphs else max(seconds, ISSUE_SECONDS * launches)


@dataclass
class AcceptanceHistory:
    """Judged and accepted attempts so far, of all prompts of a run; starts at a prior of 1 in 4."""

    judged: int = 4
    accepted: int = 1

    @property
    def miss(self) -> float:
        """The share of attempts that were rejected, to the hundredth: so that few are to be thought about."""
        return round(1 - self.accepted / self.judged, 2)


@functools.lru_cache(maxsize=4096)
def best_shape(prompts: int, max_attempts: int, miss: float, cost: Cost, width: int | None = None) -> Shape:
    """Return the shape with the lowest expected cost of a decided segment, where an attempt fails with chance `miss`.

    A round takes place if all attempts before it were rejected; after max_attempts the best is taken. In a round, so
    does a wave. width: given; None = to be found.
    """
    widths = sorted({min(choice, max_attempts) for choice in CHOICES}) if width is None else [width]
    shapes = [Shape(w, v) for w in widths for v in (*CHOICES, w) if v == w or (cost.waves and v < w)]
    return min(shapes, key=lambda shape: expected_cost(shape, prompts, max_attempts, miss, cost))


def enough_slots(max_attempts: int, miss: float, cost: Cost) -> int:
    """Return how many prompts to decode side by side: twice as many would gain less than SLOT_GAIN."""
    slots, once = 1, _cost_of_each(1, max_attempts, miss, cost)
    while slots < MAX_SLOTS and once >= SLOT_GAIN * (twice := _cost_of_each(2 * slots, max_attempts, miss, cost)):
        slots, once = 2 * slots, twice
    return slots


def _cost_of_each(slots: int, max_attempts: int, miss: float, cost: Cost) -> float:
    return expected_cost(best_shape(slots, max_attempts, miss, cost), slots, max_attempts, miss, cost) / slots


def expected_cost(shape: Shape, prompts: int, max_attempts: int, miss: float, cost: Cost) -> float:
    """Return the expected cost of a decided segment: of its rounds, all prompts' at once, and of their waves."""
    total = 0.0
    sampled = cost.sample(prompts * shape.width)
    scored = later = 0.0
    for first in range(0, shape.width, shape.wave):
        open_share = miss**first  # of the prompts, those that have none accepted before this wave
        any_open = 1 - (1 - open_share) ** prompts
        rows = prompts * min(shape.wave, shape.width - first)
        if any_open > 0:
            scored += any_open * cost.score(rows * open_share / any_open)
        later += any_open if first else 0.0
    judged = cost.judge(later if shape.wave < shape.width else None)
    for first in range(0, max_attempts, shape.width):
        total += miss**first * (sampled + scored + judged)
    return total
