"""A round of STARS decoding on a GPU, of the engine and of vLLM, and the time until a batch is done: by formula.

A round is that of stars_kernels/decoder/loop.py and stars_kernels/hf, in three phases: a step for the last token of
each segment that the round before decided; segment - 1 steps of prompts x width rows, their first tokens from stored
logits; the reward model's pass over all rows, decisions and commits. A CUDA graph holds the second one alone. The host
is taken to wait at the end of each; as built it waits at the end of the round alone, and gets no credit for that here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.kernels import BF16, Gpu, Kernel, Model, forward, fuse, prefix_reads, segment_sample

NEW_TOKENS = 120  # of an answer: about the papers' 128, and a multiple of both segments
MAX_ATTEMPTS = 20
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 32)  # as stars_kernels/decoder/width.py, which would import torch
ROWS_PER_STEP_COST = 24
ROUND_LAUNCHES = 100  # of a round outside the forwards and the ops: candidates' lengths, thresholds, grids
ISSUE_SECONDS = 10e-6  # the host needs for a launch; it runs ahead of the GPU inside a phase
GAP_SECONDS = 1e-6  # between two kernels on the GPU, in a CUDA graph too
HOST_SECONDS = 2e-3  # a round, for both: results to the host, bookkeeping of the attempts
PREFILL_TOKENS = 1024  # of one forward
MEMORY_SHARE = 0.9  # of a GPU's that a program gets
BLOCK = 16  # tokens of KV that vLLM caches together
VLLM_CPU_SECONDS = 1e-3  # a step, hidden behind the GPU's work where that takes longer


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
    def middle(self) -> float:
        """The prefix half way through the answer."""
        return self.prompt_tokens + NEW_TOKENS / 2


Cost = Callable[[float, int, float], float]
"""(prompts, width, tokens of a prefix) -> seconds of a round."""
Choose = Callable[[float, float], int]
"""(prompts, tokens of a prefix) -> width."""


def ours(
    job: Job, prompts: float, width: int, prefix: float, *, filtered: bool = True, fused_head: bool = False,
    fused_elementwise: bool = False,
) -> list[Kernel]:  # fmt: skip
    """A round of the engine."""
    m, steps, rows, ready = job.model, job.segment - 1, prompts * width, prompts * job.decided(width)
    step = partial(forward, m, prefix=prefix, fused=fused_elementwise)
    reads = prompts * prefix_reads(m, width), prompts * prefix_reads(m, width, job.segment)
    last = step("last token", ready, prefixes=ready, own=1)
    last.append(Kernel("last token: kv_commit", 2 * m.kv_bytes * ready))
    segment = [segment_sample(m, "first token", rows, prompts, 1, filtered)]  # its logits are always kept
    segment += step("step", rows, prefixes=reads[0], own=job.segment / 2, calls=steps, head=not fused_head)
    segment.append(
        fuse(m, "step", rows, steps) if fused_head else segment_sample(m, "step", rows, rows, steps, filtered)
    )
    judged = step("RM", rows, job.segment, prefixes=reads[1], own=job.segment, head=False)
    judged += [
        Kernel("reward_head", BF16 * m.hidden * (rows + 1), vector_flops=2 * rows * m.hidden),
        Kernel("accept", 17 * rows + 56 * prompts),
        Kernel("kv_commit (LM, RM)", 2 * m.kv_bytes * prompts * (job.segment - 0.5), calls=2),
        Kernel("bookkeeping", 0, launches=ROUND_LAUNCHES),
    ]
    phases = {"last token": last, "segment": segment, "RM": judged}
    return [k._replace(phase=name, graphed=name == "segment") for name, phase in phases.items() for k in phase]


def prefill(job: Job, fused: bool = False) -> list[Kernel]:
    """Both models read the prompts."""
    n, calls = job.prompt_tokens, math.ceil(job.prompts * job.prompt_tokens / PREFILL_TOKENS)
    read = partial(forward, job.model, rows=job.prompts / calls, tokens=n, prefixes=0, prefix=0, own=n, calls=calls)
    return read("prefill", fused=fused) + read("prefill RM", fused=fused, head=False)


def launches(kernels: Sequence[Kernel], graph: bool = False) -> float:
    """That the host issues: a segment's graph is one."""
    eager = [k for k in kernels if not (graph and k.graphed)]
    return sum(k.calls * k.launches for k in eager) + (len(eager) < len(kernels))


def round_seconds(gpu: Gpu, kernels: Sequence[Kernel], graph: bool) -> float:
    """The host issues launches while the GPU works, and is taken to wait for it at the end of a phase."""
    seconds = HOST_SECONDS
    for name in {k.phase for k in kernels}:
        phase = [k for k in kernels if k.phase == name]
        work = sum(k.seconds(gpu) for k in phase) + GAP_SECONDS * launches(phase)
        seconds += max(work, ISSUE_SECONDS * launches(phase, graph))
    return seconds


def perfect_seconds(gpu: Gpu, kernels: Sequence[Kernel]) -> float:
    """In vLLM's favour: no cost of launches, and element-wise kernels take no time."""
    return sum(k.seconds(gpu) for k in kernels if "element-wise" not in k.name)


def vllm_seconds(job: Job, prompts: float, width: int, prefix: float, rm_cached: bool) -> float:
    """A round of requests of `width` samples, then their prefixes in a second engine with the reward model.

    Full blocks of a prefix are cached, the rest is read again for each row, and attention reads a prefix once a row. In
    vLLM's favour: its CPU is hidden behind the GPU, it has our sampler and no more bookkeeping than ours.
    """
    m, rows, steps = job.model, prompts * width, job.segment - 1
    tail = min((BLOCK + 1) / 2, prefix)  # 1 to BLOCK tokens: the last one is always read again
    left = min((BLOCK - 1) / 2, prefix) if rm_cached else prefix
    first = forward(m, "", rows, tail, prefixes=rows, prefix=prefix - tail, own=tail)
    decode = forward(m, "", rows, prefixes=rows, prefix=prefix, own=job.segment / 2, calls=steps)
    score = left + job.segment
    rm = forward(m, "", rows, score, prefixes=rows, prefix=prefix - left, own=score, head=False)
    first.append(segment_sample(m, "", rows, rows, 1, filtered=True))
    decode.append(segment_sample(m, "", rows, rows, steps, filtered=True))
    passes = ((1, first), (steps, decode), (1, rm))
    return HOST_SECONDS + sum(
        max(count * VLLM_CPU_SECONDS, perfect_seconds(job.gpu, kernels)) for count, kernels in passes
    )


def best_width(job: Job, cost: Cost, prompts: float, prefix: float) -> int:
    """The lowest modelled time for a decided segment."""
    return min(job.widths, key=lambda width: cost(prompts, width, prefix) / job.decided(width))


def table_width(job: Job, prompts: float) -> int:
    """What width="auto" takes, by the fixed cost table of stars_kernels/decoder/width.py (made for a CPU)."""
    miss = 1 - job.acceptance
    return min(job.widths, key=lambda w: (1 + prompts * w / ROWS_PER_STEP_COST) / (1 - miss**w + 1e-9))


def rounds_seconds(job: Job, cost: Cost, choose: Choose) -> float:
    """Expected seconds until all prompts have their answers, prompts leaving the batch as they finish."""
    states = {(0, 0): 1.0}  # (segments done, attempts at the next one): share of the prompts
    seconds = 0.0
    while (active := min(1.0, sum(states.values()))) > 1e-6:
        happens = 1 - (1 - active) ** job.prompts
        prompts = job.prompts * active / happens
        prefix = job.prompt_tokens + job.segment * sum(done * p for (done, _), p in states.items()) / active
        width = choose(prompts, prefix)
        seconds += happens * cost(prompts, width, prefix)
        after: dict[tuple[int, int], float] = {}
        for (done, attempts), p in states.items():
            tried = min(width, MAX_ATTEMPTS - attempts)
            miss = 0.0 if attempts + tried == MAX_ATTEMPTS else (1 - job.acceptance) ** tried  # 0: the fallback
            after[done, attempts + tried] = after.get((done, attempts + tried), 0.0) + p * miss
            after[done + 1, 0] = after.get((done + 1, 0), 0.0) + p * (1 - miss)
        states = {s: p for s, p in after.items() if p > 0 and s[0] < NEW_TOKENS // job.segment}
    return seconds
