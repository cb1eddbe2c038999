"""What a round of the engine costs on a GPU: its phases' kernels and launches, and the seconds of these, by formula.

A round is that of stars_kernels/decoder/round.py and stars_kernels/hf, in three phases: a step for the last
token of each segment that the round before decided; segment - 1 steps of prompts x width rows, their first tokens from
stored logits; the reward model's pass over all rows, decisions and commits. The model lets the host wait after each
phase, where the engine waits once a round. Launches are those of bench/parts.py. CUDA graphs: one holds the forward for
last tokens, one a step of a segment (its first draw is eager), one the reward model's pass; what lies around them is
issued launch by launch. Where the device judges, the host waits for no phase, and its own work
hides behind the GPU's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from bench import counted
from bench.assumptions import Values
from bench.kernels import (
    Kernel,
    around,
    attention_splits,
    forward,
    kv_commit,
    lm_head_sample,
    prefix_reads,
    reward_head,
    segment_sample,
)
from bench.parts import BUILT, Engine
from bench.schedule import Job, Shape, Wave, bucket_of, waves
from bench.sizes import Gpu, merges

LATER_WAVE = "RM, later wave"
PREFILL_TOKENS, PREFILL_PIECES = 1024, 64  # tokens and prompts of one forward: stars_kernels/hf/proposing/proposer.py


def ours(
    job: Job, prompts: float, width: int, prefix: float, *, filtered: bool = True, fused_head: bool = False,
    engine: Engine = BUILT, padded: bool = False, wave: int | None = None,
) -> list[Kernel]:  # fmt: skip
    """A round of the engine.

    padded: rows, to the bucket of their graph. wave: the columns that are scored at once; the next ones of a prompt
    only if none of these is accepted. None = all.
    """
    m, steps, rows, ready = job.model, job.segment - 1, prompts * width, prompts * job.decided(width)
    wide = bucket_of(rows) if padded else rows
    step = partial(forward, m, prefix=prefix, engine=engine, merged=merges(m, job.gpu))
    last = graphed("last token", step("last token", ready, prefixes=ready, own=1, splits=splits(job, ready, 1)))
    last += [kv_commit(m, "last token", ready), around("last token", counted.LAST_TOKEN)]

    segment = segment_sample(m, "first token", wide, prompts, 1, filtered)  # its logits are always kept
    reread = prompts * (prefix_reads(m, width) - 1)
    segment += graphed(
        "step",
        [
            *step("step", wide, prefixes=prompts, reread=reread, own=job.segment / 2, calls=steps, head=not fused_head,
                  splits=splits(job, wide, 1)),
            *(lm_head_sample(m, "step", wide, steps) if fused_head
              else segment_sample(m, "step", wide, wide, steps, filtered)),
            around("step", engine.step, steps),
        ],
    )  # fmt: skip
    segment.append(around("segment", counted.SEGMENT))
    phases = {"last token": last, "segment": segment}

    first, *others = waves(job, prompts, Shape(width, wave or width))
    ahead = engine.has("device") and not others
    judged = [around("round", counted.ROUND), kv_commit(m, "LM, RM", prompts * (job.segment - 0.5), calls=2)]
    phases["RM"] = [
        *judging(job, first, prefix, engine, padded),
        around("RM", counted.SCORE + (counted.WAVES if others else 0)),
        *judged,
    ]
    for number, later in enumerate(others, start=2):
        found = [*judging(job, later, prefix, engine, padded, number), around(LATER_WAVE, counted.WAVE)]
        phases[f"RM, wave {number}"] = [k._replace(calls=later.happens * k.calls) for k in found]
    return [k._replace(phase=p, ahead=ahead) for p, phase in phases.items() for k in phase]


def graphed(name: str, kernels: Sequence[Kernel]) -> list[Kernel]:
    """Let these kernels be a CUDA graph, replayed as often as the least frequent of them is called."""
    return [k._replace(graph=name) for k in kernels]


def judging(job: Job, wave: Wave, prefix: float, engine: Engine, padded: bool, number: int = 1) -> list[Kernel]:
    """The reward model's pass over the rows of a wave."""
    m, rows = job.model, bucket_of(wave.rows) if padded else wave.rows
    reads = wave.prompts * prefix_reads(m, wave.rows / wave.prompts, job.segment)
    return graphed(
        f"RM {number}",
        [
            *forward(
                m, "RM", rows, job.segment, prefixes=wave.prompts, reread=reads - wave.prompts, prefix=prefix,
                own=job.segment, head=False, engine=engine, merged=merges(m, job.gpu),
                splits=splits(job, rows, job.segment),
            ),
            reward_head(m, "RM", rows),
        ],
    )  # fmt: skip


def splits(job: Job, rows: float, tokens: int) -> int:
    return attention_splits(job.model, job.prompts, rows, tokens, job.slots)


def prefill(job: Job, engine: Engine = BUILT) -> list[Kernel]:
    """Both models read the prompts, packed: one attention call a layer (stars_kernels/hf/cache/fork.py)."""
    m, n = job.model, job.prompt_tokens
    pieces = math.ceil(n / PREFILL_TOKENS)
    together = min(PREFILL_PIECES, PREFILL_TOKENS // n) if pieces == 1 else 1
    calls = math.ceil(job.prompts / together) if pieces == 1 else job.prompts * pieces
    kernels = []
    for name, head in (("prefill", True), ("prefill RM", False)):
        kernels += forward(
            m, name, job.prompts / calls, n, prefixes=0, prefix=0, own=n, calls=calls, head=head, engine=engine,
            prefill=True, merged=merges(m, job.gpu),
        )  # fmt: skip
    kernels += [around("prefill", counted.PREFILL, calls), around("prefill RM", counted.PREFILL_REWARD, calls)]
    kernels.append(reward_head(m, "prefill RM", job.prompts / calls)._replace(calls=calls))
    return kernels


def launches(kernels: Sequence[Kernel], graph: bool = False) -> float:
    """That the host issues: a replay of a graph is one."""
    eager = [k for k in kernels if not (graph and k.graph)]
    return sum(k.calls * k.launches for k in eager) + (sum(replays(kernels).values()) if graph else 0)


def replays(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Replays of each graph, by name."""
    found: dict[str, float] = {}
    for k in kernels:
        if k.graph:
            found[k.graph] = min(found.get(k.graph, k.calls), k.calls)
    return found


def issued_seconds(gpu: Gpu, kernels: Sequence[Kernel], graph: bool, given: Values) -> float:
    """The host issues launches while the GPU works, and is modelled as waiting for it at the end of a phase."""
    seconds, phases = 0.0, dict[str, list[Kernel]]()
    for k in kernels:
        phases.setdefault("ahead" if k.ahead else k.phase, []).append(k)
    for phase in phases.values():
        work = sum(k.seconds(gpu, given) for k in phase) + given.gap_seconds * launches(phase)
        seconds += max(work, given.issue_seconds * launches(phase, graph))
    return seconds


def round_seconds(gpu: Gpu, kernels: Sequence[Kernel], graph: bool, given: Values) -> float:
    work = issued_seconds(gpu, kernels, graph, given)
    if kernels[0].ahead:
        return max(given.host_seconds, work)
    later = sum(k.calls for k in kernels if k.name.startswith(LATER_WAVE))  # the host learns who is undecided once more
    return given.host_seconds * (1 + later / 2) + work


def capture_seconds(kernels: Sequence[Kernel], given: Values) -> float:
    """The host issues each graph's launches, while the GPU waits, and instantiates it: once for all its replays."""
    often = replays(kernels)
    nodes = sum(k.calls * k.launches / often[k.graph] for k in kernels if k.graph)
    return nodes * (given.issue_seconds + given.node_seconds)
