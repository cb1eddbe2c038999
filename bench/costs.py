"""What a round of the engine costs on a GPU: its phases' kernels and launches, and the seconds of these, by formula.

A round is that of stars_kernels/decoder/round.py and stars_kernels/hf, in three phases: a step for the last
token of each segment that the round before decided; segment - 1 steps of prompts x width rows, their first tokens from
stored logits; the reward model's pass over all rows, decisions and commits. The model lets the host wait after each
phase, where the engine waits once a round. A CUDA graph holds the second phase alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from bench.assumptions import Values
from bench.kernels import (
    PREFILL_ELEMENTWISE,
    STEP_LAUNCHES,
    Gpu,
    Kernel,
    attention_splits,
    forward,
    kv_commit,
    lm_head_sample,
    prefix_reads,
    reward_head,
    segment_sample,
)
from bench.schedule import Job, bucket_of

ROUND_LAUNCHES = 100  # of a round outside the forwards and the ops: candidates' lengths and ends
PREFILL_TOKENS, PREFILL_PIECES = 1024, 64  # tokens and prompts of one forward: stars_kernels/hf/proposing/proposer.py


def ours(
    job: Job, prompts: float, width: int, prefix: float, *, filtered: bool = True, fused_head: bool = False,
    fused_elementwise: bool = False, padded: bool = False, wave: int | None = None,
) -> list[Kernel]:  # fmt: skip
    """A round of the engine.

    padded: the segment's rows, to the bucket of its graph. wave: the columns that are scored first; the others of a
    prompt only if none of these is accepted.
    """
    m, steps, rows, ready = job.model, job.segment - 1, prompts * width, prompts * job.decided(width)
    wide = bucket_of(rows) if padded else rows
    step = partial(forward, m, prefix=prefix, fused=fused_elementwise)
    last = step("last token", ready, prefixes=ready, own=1, splits=splits(job, ready, 1))
    last.append(kv_commit(m, "last token", ready))

    segment = segment_sample(m, "first token", wide, prompts, 1, filtered)  # its logits are always kept
    reads = prompts * prefix_reads(m, width)
    segment += step(
        "step", wide, prefixes=reads, own=job.segment / 2, calls=steps, head=not fused_head, splits=splits(job, wide, 1)
    )
    segment += (
        lm_head_sample(m, "step", wide, steps) if fused_head else segment_sample(m, "step", wide, wide, steps, filtered)
    )
    phases = {"last token": last, "segment": segment}

    first = width if wave is None else wave
    phases["RM"] = judging(job, prompts, first, prefix, fused_elementwise)
    if first < width:
        undecided = prompts * (1 - job.acceptance) ** first
        phases["RM, second wave"] = judging(job, undecided, width - first, prefix, fused_elementwise)
    phases["RM"].append(kv_commit(m, "LM, RM", prompts * (job.segment - 0.5), calls=2))
    return [k._replace(phase=name, graphed=name == "segment") for name, phase in phases.items() for k in phase]


def judging(job: Job, prompts: float, width: int, prefix: float, fused: bool) -> list[Kernel]:
    """The reward model's pass over `width` attempts of each prompt, and the decisions."""
    m, rows = job.model, prompts * width
    reads = prompts * prefix_reads(m, width, job.segment)
    return [
        *forward(
            m, "RM", rows, job.segment, prefixes=reads, prefix=prefix, own=job.segment, head=False, fused=fused,
            splits=splits(job, rows, job.segment),
        ),
        reward_head(m, "RM", rows),
        Kernel("RM: bookkeeping", 0, launches=ROUND_LAUNCHES),
    ]  # fmt: skip


def splits(job: Job, rows: float, tokens: int) -> int:
    return attention_splits(job.model, job.prompts, rows, tokens, job.slots)


def prefill(job: Job, fused: bool = False) -> list[Kernel]:
    """Both models read the prompts, packed: one attention call a layer (stars_kernels/hf/cache/fork.py)."""
    m, n = job.model, job.prompt_tokens
    pieces = math.ceil(n / PREFILL_TOKENS)
    together = min(PREFILL_PIECES, PREFILL_TOKENS // n) if pieces == 1 else 1
    calls = math.ceil(job.prompts / together) if pieces == 1 else job.prompts * pieces
    kernels = []
    for name, head in (("prefill", True), ("prefill RM", False)):
        for k in forward(
            m, name, job.prompts / calls, n, prefixes=0, prefix=0, own=n, calls=calls, head=head, fused=fused
        ):
            if "element-wise" in k.name and not fused:
                k = k._replace(launches=PREFILL_ELEMENTWISE * m.layers + STEP_LAUNCHES)
            kernels.append(k)
    return kernels


def launches(kernels: Sequence[Kernel], graph: bool = False) -> float:
    """That the host issues: a segment's graph is one."""
    eager = [k for k in kernels if not (graph and k.graphed)]
    return sum(k.calls * k.launches for k in eager) + (len(eager) < len(kernels))


def issued_seconds(gpu: Gpu, kernels: Sequence[Kernel], graph: bool, given: Values) -> float:
    """The host issues launches while the GPU works, and is modelled as waiting for it at the end of a phase."""
    seconds = 0.0
    for name in {k.phase: None for k in kernels}:
        phase = [k for k in kernels if k.phase == name]
        work = sum(k.seconds(gpu, given) for k in phase) + given.gap_seconds * launches(phase)
        seconds += max(work, given.issue_seconds * launches(phase, graph))
    return seconds


def round_seconds(gpu: Gpu, kernels: Sequence[Kernel], graph: bool, given: Values) -> float:
    waves = any("second wave" in k.phase for k in kernels)  # the host learns who is undecided once more
    return given.host_seconds * (1.5 if waves else 1) + issued_seconds(gpu, kernels, graph, given)


def capture_seconds(kernels: Sequence[Kernel], given: Values) -> float:
    """The host issues a segment's launches into a graph, while the GPU waits, and instantiates it."""
    nodes = launches([k for k in kernels if k.graphed])
    return nodes * (given.issue_seconds + given.node_seconds)
