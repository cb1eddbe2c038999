"""What a round of the engine costs on a GPU: its phases' kernels and launches, and the seconds of these, by formula.

A round is that of stars_kernels/decoder/device_rounds.py and stars_kernels/hf, in three phases: a step for the last
token of each segment that the round before decided; segment - 1 steps of prompts x width rows, their first tokens from
stored logits; the reward model's pass over all rows, judgement and commits. The device goes from one to the next, and
from round to round, while the host books the round before. In waves, or without graphs, the host judges; it is
modelled as waiting after each phase, where the engine waits once a round. Launches are those of bench/counted.py. CUDA
graphs: one is the forward for last tokens, one a step of a segment (its first draw is eager), one the reward model's
pass; what lies around them is issued launch by launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from bench import counted
from bench.assumptions import Values
from bench.kernels import (
    Gpu,
    Kernel,
    around,
    attention_splits,
    forward,
    kv_commit,
    lm_head_sample,
    merges,
    prefix_reads,
    reward_head,
    segment_sample,
)
from bench.schedule import Job, Wave, bucket_of, waves

LATER_WAVE = "RM, later wave"
PREFILL_TOKENS, PREFILL_PIECES = 1024, 64  # tokens and prompts of one forward: stars_kernels/hf/proposing/proposer.py


def ours(
    job: Job, prompts: float, width: int, prefix: float, *, filtered: bool = True, fused_head: bool = False,
    padded: bool = False, wave: int | None = None,
) -> list[Kernel]:  # fmt: skip
    """A round of the engine.

    padded: the segment's rows, to the bucket of its graph. wave: the columns that are scored at once; the next ones of
    a prompt only if none of these is accepted. None = all.
    """
    m, steps, rows, ready = job.model, job.segment - 1, prompts * width, prompts * job.decided(width)
    wide = bucket_of(rows) if padded else rows
    step = partial(forward, m, prefix=prefix, merged=merges(m, job.gpu))
    last = graphed(step("last token", ready, prefixes=ready, own=1, splits=splits(job, ready, 1)))
    last += [kv_commit(m, "last token", ready), around("last token", counted.LAST_TOKEN)]

    segment = segment_sample(m, "first token", wide, prompts, 1, filtered)  # its logits are always kept
    reads = prompts * prefix_reads(m, width)
    segment += graphed(
        [
            *step("step", wide, prefixes=reads, own=job.segment / 2, calls=steps, head=not fused_head,
                  splits=splits(job, wide, 1)),
            *(lm_head_sample(m, "step", wide, steps) if fused_head
              else segment_sample(m, "step", wide, wide, steps, filtered)),
            around("step", counted.STEP, steps),
        ]
    )  # fmt: skip
    segment.append(around("segment", counted.SEGMENT))
    phases = {"last token": last, "segment": segment}

    first, *others = waves(job, prompts, width, width if wave is None else wave)
    phases["RM"] = judging(job, first, prefix)
    phases["RM"] += [
        around("RM", counted.SCORE + (counted.WAVES if others else 0)),
        around("round", counted.ROUND),
        kv_commit(m, "LM, RM", prompts * (job.segment - 0.5), calls=2),
    ]
    for number, later in enumerate(others, start=2):
        found = [*judging(job, later, prefix), around(LATER_WAVE, counted.WAVE)]
        phases[f"RM, wave {number}"] = [k._replace(calls=later.happens * k.calls) for k in found]
    return [k._replace(phase=p) for p, phase in phases.items() for k in phase]


def graphed(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Let these kernels be a CUDA graph of their phase, replayed as often as the least frequent of them is called."""
    return [k._replace(graphed=True) for k in kernels]


def judging(job: Job, wave: Wave, prefix: float) -> list[Kernel]:
    """The reward model's pass over the rows of a wave."""
    m = job.model
    reads = wave.prompts * prefix_reads(m, wave.rows / wave.prompts, job.segment)
    return graphed(
        [
            *forward(
                m, "RM", wave.rows, job.segment, prefixes=wave.prompts, reread=reads - wave.prompts, prefix=prefix,
                own=job.segment, head=False, merged=merges(m, job.gpu), splits=splits(job, wave.rows, job.segment),
            ),
            reward_head(m, "RM", wave.rows),
        ]
    )  # fmt: skip


def splits(job: Job, rows: float, tokens: int) -> int:
    return attention_splits(job.model, job.prompts, rows, tokens, job.slots)


def prefill(job: Job) -> list[Kernel]:
    """Both models read the prompts, packed: one attention call a layer (stars_kernels/hf/cache/fork.py)."""
    m, n = job.model, job.prompt_tokens
    pieces = math.ceil(n / PREFILL_TOKENS)
    together = min(PREFILL_PIECES, PREFILL_TOKENS // n) if pieces == 1 else 1
    calls = math.ceil(job.prompts / together) if pieces == 1 else job.prompts * pieces
    kernels = []
    for name, head in (("prefill", True), ("prefill RM", False)):
        for k in forward(
            m,
            name,
            job.prompts / calls,
            n,
            prefixes=0,
            prefix=0,
            own=n,
            calls=calls,
            head=head,
            merged=merges(m, job.gpu),
        ):
            if "element-wise" in k.name:
                k = k._replace(launches=counted.PREFILL_ELEMENTWISE * m.layers + counted.FORWARD)
            kernels.append(k)
    kernels += [around("prefill", counted.PREFILL, calls), around("prefill RM", counted.PREFILL_REWARD, calls)]
    kernels.append(reward_head(m, "prefill RM", job.prompts / calls)._replace(calls=calls))
    return kernels


def launches(kernels: Sequence[Kernel], graph: bool = False) -> float:
    """That the host issues: a replay of a graph is one."""
    eager = [k for k in kernels if not (graph and k.graphed)]
    return sum(k.calls * k.launches for k in eager) + (sum(replays(kernels).values()) if graph else 0)


def replays(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Replays of each phase's graph, by phase."""
    found: dict[str, float] = {}
    for k in kernels:
        if k.graphed:
            found[k.phase] = min(found.get(k.phase, k.calls), k.calls)
    return found


def issued_seconds(gpu: Gpu, kernels: Sequence[Kernel], graph: bool, given: Values) -> float:
    """The host issues launches while the GPU works, and is modelled as waiting for it at the end of a phase."""
    seconds = 0.0
    for name in {k.phase: None for k in kernels}:
        phase = [k for k in kernels if k.phase == name]
        work = sum(k.seconds(gpu, given) for k in phase) + given.gap_seconds * launches(phase)
        seconds += max(work, given.issue_seconds * launches(phase, graph))
    return seconds


def round_seconds(gpu: Gpu, kernels: Sequence[Kernel], graph: bool, given: Values) -> float:
    """A round that the device judges keeps it busy all the time: the host is one behind, if it is fast enough.

    One in waves, or without graphs, is the host's: it waits for each wave's rewards.
    """
    later = sum(k.calls for k in kernels if k.name.startswith(LATER_WAVE))  # the host learns who is undecided once more
    if graph and not any(k.name.startswith(LATER_WAVE) for k in kernels):
        work = sum(k.seconds(gpu, given) for k in kernels) + given.gap_seconds * launches(kernels)
        return max(work, given.host_seconds + given.issue_seconds * launches(kernels, graph))
    return given.host_seconds * (1 + later / 2) + issued_seconds(gpu, kernels, graph, given)


def capture_seconds(kernels: Sequence[Kernel], given: Values) -> float:
    """The host issues each graph's launches, while the GPU waits, and instantiates it: once for all its replays."""
    often = replays(kernels)
    nodes = sum(k.calls * k.launches / often[k.phase] for k in kernels if k.graphed)
    return nodes * (given.issue_seconds + given.node_seconds)
