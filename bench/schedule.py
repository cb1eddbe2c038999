"""Which rounds a batch takes until all prompts have their answers, in expectation: prompts, width, prefix of each."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from bench.sizes import BF16, Gpu, Model, merges

NEW_TOKENS = 120  # of an answer: about the papers' 128, and a multiple of both segments
MAX_ATTEMPTS = 20
BATCH_SHARE = 0.8  # of batch_size="auto": stars_kernels/hf/sizing.py, which would import torch
MEMORY_SHARE = 0.9  # of a GPU's that a program gets


def _decoder_width() -> ModuleType:
    """stars_kernels/decoder/width.py by itself: its package would import torch."""
    path = Path(__file__).parents[1] / "stars_kernels/decoder/width.py"
    spec = importlib.util.spec_from_file_location("bench.decoder_width", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there for their names
    spec.loader.exec_module(module)
    return module


decoder_width = _decoder_width()
WIDTHS = tuple(w for w in decoder_width.CHOICES if w <= MAX_ATTEMPTS)


@dataclass(frozen=True)
class Job:
    gpu: Gpu
    model: Model
    prompts: int
    prompt_tokens: int
    segment: int
    acceptance: float  # of one attempt

    def rounds(self, width: int) -> float:
        """Expected rounds a segment: round n happens if all n * width attempts before were rejected."""
        return sum((1 - self.acceptance) ** attempts for attempts in range(0, MAX_ATTEMPTS, width))

    def decided(self, width: int) -> float:
        """Share of the prompts that a round gives a segment, on average."""
        return 1 / self.rounds(width)

    @property
    def weights(self) -> float:
        """Bytes of both models, the reward model without an LM head."""
        return BF16 * (2 * self.model.parameters - (0 if self.model.tied else self.model.head))

    def prompt_bytes(self, width: int) -> float:
        """Of one prompt and its rows: both models' keys and values, and logits."""
        m = self.model
        kv = 2 * m.kv_bytes * (self.prompt_tokens + NEW_TOKENS + width * self.segment)
        return kv + (width + 1) * m.vocabulary * BF16

    def memory(self, width: int) -> float:
        """Bytes of both models, of all prompts and their rows."""
        return self.weights + self.prompts * self.prompt_bytes(width)

    @property
    def widths(self) -> list[int]:
        """Those that fit the GPU."""
        return [w for w in WIDTHS if self.memory(w) <= MEMORY_SHARE * self.gpu.memory]

    @property
    def row(self) -> dict[str, Any]:
        """The first columns of a table."""
        return {"gpu": self.gpu.name, "model": self.model.name, "segment": self.segment}

    @property
    def name(self) -> str:
        return f"{self.model.name} on {self.gpu.name}, segment {self.segment}"

    @property
    def middle(self) -> float:
        """The prefix half way through the answer."""
        return self.prompt_tokens + NEW_TOKENS / 2

    @property
    def slots(self) -> int:
        """Of the key and value arena, for a prompt."""
        return self.prompt_tokens + NEW_TOKENS


class Shape(NamedTuple):
    width: int
    wave: int  # columns that are scored at once


class Round(NamedTuple):
    happens: float  # with this probability
    prompts: float  # at work, if it happens
    shape: Shape
    prefix: float  # tokens


class Wave(NamedTuple):
    happens: float  # with this probability
    prompts: float  # still undecided, if it happens
    rows: float


Choose = Callable[[int], Shape]
"""Of a round, by the prompts at work."""
Cost = Callable[[int, Shape], float]
"""(prompts, shape) -> seconds of a round, of a prefix in the middle of an answer."""
WAVES = (1, 2, 4, 8)
"""Columns scored at once, beside all."""


def waves_of(width: int) -> list[int]:
    return [*(w for w in WAVES if w < width), width]


def best_shape(job: Job, cost: Cost, waves: bool = True) -> Choose:
    """The lowest modelled time for a decided segment, about. waves: or all columns are scored at once."""
    shapes = [Shape(w, v) for w in job.widths for v in (waves_of(w) if waves else [w])]
    best = cache(lambda prompts: min(shapes, key=lambda shape: cost(prompts, shape) / job.decided(shape.width)))
    return lambda prompts: best(bucket_of(prompts))  # a shape serves all numbers of a bucket


def auto_shape(job: Job) -> Choose:
    """What width="auto" and wave="auto" take, by the costs of stars_kernels/decoder/width.py, which know no prefix."""
    cost = _engine_cost(job)
    history = decoder_width.AcceptanceHistory(judged=1000, accepted=round(1000 * job.acceptance))

    def choose(prompts: int) -> Shape:
        width, wave = decoder_width.best_shape(prompts, MAX_ATTEMPTS, history.miss, cost)
        width = min(width, max(job.widths))
        return Shape(width, min(wave, width))

    return choose


def auto_batch(job: Job) -> int:
    """What batch_size="auto" takes: a power of two, what the memory that the models leave holds, or less."""
    enough = decoder_width.enough_slots(MAX_ATTEMPTS, decoder_width.AcceptanceHistory().miss, _engine_cost(job))
    fitting = int(BATCH_SHARE * (MEMORY_SHARE * job.gpu.memory - job.weights) / job.prompt_bytes(max(WIDTHS)))
    return 1 << (max(1, min(fitting, enough)).bit_length() - 1)


def _engine_cost(job: Job) -> Any:
    """The `GpuCost` that the engine goes by."""
    m = job.model
    body, state, logits = m.layers * m.linears, m.hidden, m.vocabulary
    own = m.layers, m.kv_bytes, BF16 * state
    layer = decoder_width.MERGED_LAUNCHES if merges(m, job.gpu) else decoder_width.LAYER_LAUNCHES
    model = decoder_width.ModelSize(BF16 * (body + m.head), body + m.head, *own, BF16 * logits, layer)
    reward = decoder_width.ModelSize(BF16 * body, body, *own, layer_launches=layer)
    return decoder_width.GpuCost(model, (reward,), job.segment, job.gpu.bandwidth, job.gpu.tensor_flops)


def schedule(job: Job, choose: Choose) -> list[Round]:
    """Rounds until all prompts have their answers, prompts leaving the batch as they finish."""
    states = {(0, 0): 1.0}  # (segments done, attempts at the next one): share of the prompts
    rounds = []
    while (active := min(1.0, sum(states.values()))) > 1e-4:
        happens = 1 - (1 - active) ** job.prompts
        prompts = job.prompts * active / happens
        prefix = job.prompt_tokens + job.segment * sum(done * p for (done, _), p in states.items()) / active
        shape = choose(math.ceil(prompts))
        rounds.append(Round(happens, prompts, shape, prefix))
        after: dict[tuple[int, int], float] = {}
        for (done, attempts), p in states.items():
            tried = min(shape.width, MAX_ATTEMPTS - attempts)
            miss = 0.0 if attempts + tried == MAX_ATTEMPTS else (1 - job.acceptance) ** tried  # 0: the fallback
            after[done, attempts + tried] = after.get((done, attempts + tried), 0.0) + p * miss
            after[done + 1, 0] = after.get((done + 1, 0), 0.0) + p * (1 - miss)
        states = {s: p for s, p in after.items() if p > 0 and s[0] < NEW_TOKENS // job.segment}
    return rounds


def waves(job: Job, prompts: float, shape: Shape) -> list[Wave]:
    """Return how a round's columns are scored, `wave` at a time; the next ones only for prompts that took none."""
    found = []
    width, wave = shape
    for done in range(0, width, wave):
        undecided = (1 - job.acceptance) ** done
        happens = 1 - (1 - undecided) ** prompts
        if happens > 0:
            left = prompts * undecided / happens
            found.append(Wave(happens, left, left * min(wave, width - done)))
    return found


def bucket_of(rows: float) -> int:
    """Rows of a graph, padding included: stars_kernels/hf/proposing/graphs.py, which would import torch."""
    whole = math.ceil(rows)
    step = max(1, 1 << max(whole.bit_length() - 3, 0))
    return -(-whole // step) * step
