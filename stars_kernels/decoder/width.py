"""width="auto": how many attempts to decode side by side. It changes speed only, and reads no clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Cost = Callable[[int], float]
"""Rows of a round -> what the round costs, in a unit of its own: only ratios count. Never less for more rows."""
CHOICES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64)

BANDWIDTH_SHARE, FLOPS_SHARE = 0.8, 0.6  # of the datasheet's that a program gets
HOST_SECONDS = 2e-3  # a round's bookkeeping
ISSUE_SECONDS = 18e-6  # the host takes for a launch outside of a CUDA graph
LAUNCH_SECONDS = 2.8e-6  # the GPU takes for a launch at least, the gap before it included
RIDGE = 2.64  # the exponent that joins bytes and operations: where both take as long, a product takes 1.3 times that
LAYER_LAUNCHES, STEP_LAUNCHES = 41, 35  # of a forward, in each layer and outside: transformers' Llama
L2_BYTES = 40e6  # activations that fit cost no bandwidth
TOKEN_STATES = 60  # hidden states' worth that a layer's element-wise kernels move for a token: transformers' Llama
LOGIT_PASSES = 3  # over a row's logits: written once, read twice


def cpu_cost(rows: int) -> float:
    """Return the cost of a round of `rows` rows on a CPU; the part that is the same for any number is 1.

    Measured for rounds of a 135M model in fp32 on packed weights, as language and reward model, on 2 cores. (Steps by
    themselves, of 1, 8, 16 and 64 rows, took 32, 38, 47 and 137 ms; scoring adds more for each row.)
    """
    return 1 + rows / 11


@dataclass(frozen=True)
class ModelSize:
    """What a forward of one model reads and computes.

    weights: bytes that a forward reads. parameters: behind them; a token takes two operations for each. kv_bytes: of a
    token's keys and values, all layers. state_bytes: of a token's hidden state. logits_bytes: of a token's logits, 0
    where there are none.
    """

    weights: float
    parameters: float
    layers: int
    kv_bytes: float
    state_bytes: float
    logits_bytes: float = 0.0


@dataclass(frozen=True)
class GpuCost:
    """Seconds of a round on a GPU, modelled from each forward's bytes, operations and launches.

    A short form of the model of `python -m bench roofline`.

    The prompts' prefixes are left out: they are read whatever the width. bandwidth, flops: the datasheet's bytes and
    operations per second. graphs: whether segments run as CUDA graphs.
    """

    model: ModelSize
    rewards: tuple[ModelSize, ...]
    segment_size: int
    bandwidth: float
    flops: float
    graphs: bool = True

    def __call__(self, rows: int) -> float:
        """One forward for the last tokens of the segments before, segment_size - 1 steps, and the reward models'."""
        last = self._forward(self.model, 0, 1)
        steps = (self.segment_size - 1) * self._forward(self.model, rows, 1, self.graphs)
        return HOST_SECONDS + last + steps + sum(self._forward(rm, rows, self.segment_size) for rm in self.rewards)

    def _forward(self, size: ModelSize, rows: int, tokens: int, graphed: bool = False) -> float:
        """Seconds for `tokens` new tokens of each row."""
        bandwidth, new = BANDWIDTH_SHARE * self.bandwidth, rows * tokens
        moved = size.weights + rows * self.segment_size * size.kv_bytes + new * LOGIT_PASSES * size.logits_bytes
        states = new * TOKEN_STATES * size.layers * size.state_bytes
        if new * 4 * size.state_bytes <= L2_BYTES:  # the widest activations, an MLP's, are about four states
            states = 0.0
        launches = LAYER_LAUNCHES * size.layers + STEP_LAUNCHES
        limits = moved / bandwidth, 2 * new * size.parameters / (FLOPS_SHARE * self.flops)
        products = sum(limit**RIDGE for limit in limits) ** (1 / RIDGE)
        seconds = products + states / bandwidth + LAUNCH_SECONDS * launches
        return seconds if graphed else max(seconds, ISSUE_SECONDS * launches)


@dataclass
class AcceptanceHistory:
    """Judged and accepted attempts so far, of a batch of prompts; starts at a prior of 1 in 4."""

    judged: int = 4
    accepted: int = 1

    def best_width(self, prompts: int, max_attempts: int, cost: Cost) -> int:
        """Return the width with the lowest expected cost of a decided segment.

        A round takes place if all attempts before it were rejected; after max_attempts the best is taken.
        """
        miss = 1 - self.accepted / self.judged

        def expected(width: int) -> float:
            return cost(prompts * width) * sum(miss**attempts for attempts in range(0, max_attempts, width))

        return min((min(width, max_attempts) for width in CHOICES), key=expected)
