"""Which rounds a batch takes until all prompts have their answers, in expectation: prompts, width, prefix of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.kernels import BF16, Gpu, Model

NEW_TOKENS = 120  # of an answer: about the papers' 128, and a multiple of both segments
MAX_ATTEMPTS = 20
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 32)  # as stars_kernels/decoder/width.py, which would import torch
ROWS_PER_STEP_COST = 24
BATCH_SIZE = 8  # StarsConfig's default
MEMORY_SHARE = 0.9  # of a GPU's that a program gets


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

    def memory(self, width: int) -> float:
        """Bytes of both models (the reward model without an LM head), their KV and the logits."""
        m, rows = self.model, self.prompts * width
        weights = 2 * m.parameters - (0 if m.tied else m.head)
        kv = 2 * m.kv_bytes * (self.prompts * (self.prompt_tokens + NEW_TOKENS) + rows * self.segment)
        return weights * BF16 + kv + (rows + self.prompts) * m.vocabulary * BF16

    @property
    def widths(self) -> list[int]:
        """Those that fit the GPU."""
        limit = MEMORY_SHARE * self.gpu.memory
        return [w for w in WIDTHS if w <= MAX_ATTEMPTS and self.memory(w) <= limit]

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


class Round(NamedTuple):
    happens: float  # with this probability
    prompts: float  # at work, if it happens
    width: int
    prefix: float  # tokens


Choose = Callable[[float, float], int]
"""(prompts, tokens of a prefix) -> width."""
Cost = Callable[[float, int, float], float]
"""(prompts, width, tokens of a prefix) -> seconds of a round."""


def best_width(job: Job, cost: Cost) -> Choose:
    """The lowest modelled time for a decided segment."""
    return lambda prompts, prefix: min(job.widths, key=lambda w: cost(prompts, w, prefix) / job.decided(w))


def table_width(job: Job) -> Choose:
    """What width="auto" takes, by the fixed cost table of stars_kernels/decoder/width.py (made for a CPU)."""
    miss = 1 - job.acceptance

    def choose(prompts: float, prefix: float) -> int:
        return min(job.widths, key=lambda w: (1 + prompts * w / ROWS_PER_STEP_COST) / (1 - miss**w + 1e-9))

    return choose


def schedule(job: Job, choose: Choose) -> list[Round]:
    """Rounds until all prompts have their answers, prompts leaving the batch as they finish."""
    states = {(0, 0): 1.0}  # (segments done, attempts at the next one): share of the prompts
    rounds = []
    while (active := min(1.0, sum(states.values()))) > 1e-6:
        happens = 1 - (1 - active) ** job.prompts
        prompts = job.prompts * active / happens
        prefix = job.prompt_tokens + job.segment * sum(done * p for (done, _), p in states.items()) / active
        width = choose(prompts, prefix)
        rounds.append(Round(happens, prompts, width, prefix))
        after: dict[tuple[int, int], float] = {}
        for (done, attempts), p in states.items():
            tried = min(width, MAX_ATTEMPTS - attempts)
            miss = 0.0 if attempts + tried == MAX_ATTEMPTS else (1 - job.acceptance) ** tried  # 0: the fallback
            after[done, attempts + tried] = after.get((done, attempts + tried), 0.0) + p * miss
            after[done + 1, 0] = after.get((done + 1, 0), 0.0) + p * (1 - miss)
        states = {s: p for s, p in after.items() if p > 0 and s[0] < NEW_TOKENS // job.segment}
    return rounds


def bucket_of(rows: float) -> int:
    """Rows of a graph, padding included: stars_kernels/hf/graphs.py, which would import torch."""
    whole = math.ceil(rows)
    step = max(1, 1 << max(whole.bit_length() - 3, 0))
    return -(-whole // step) * step
