"""vLLM as the strongest rival, assumed better than it is: requests of `width` samples, a second engine for rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bench.assumptions import Values, perfect
from bench.kernels import Kernel, forward, segment_sample
from bench.schedule import Job, Shape, Wave, waves
from bench.sizes import Gpu

BLOCK = 16  # tokens of KV that vLLM caches together


class Rival(NamedTuple):
    """waves: it scores as ours does, in waves that are best for it. l2: a prompt's rows share its prefix there.

    requests: each row costs its CPU something.
    """

    name: str
    what: str
    waves: bool = True
    l2: bool = False
    requests: bool = False


RIVALS = (
    Rival("vLLM", "perfect kernels and graphs, prefix caching, attention reads a prefix from memory for each row; all "
          "columns scored at once", waves=False),
    Rival("vLLM, waves", "the same, but it scores in waves as ours does"),
    Rival("vLLM, waves, L2", "with waves, and rows of one prompt find their prefix in L2 once it was read", l2=True),
    Rival("vLLM, waves, requests", "with waves, and a cost of the CPU for each row of a round", requests=True),
)  # fmt: skip


class Pass(NamedTuple):
    steps: int
    kernels: list[Kernel]
    happens: float = 1


def vllm(job: Job, prompts: float, shape: Shape, prefix: float, rival: Rival = RIVALS[0]) -> list[Pass]:
    """A round: first tokens behind the prefixes, the other steps, then their prefixes in the reward model's engine.

    Full blocks of a prefix are cached, the rest is read again for each row; attention reads a prefix once a row.
    """
    m, rows, steps = job.model, prompts * shape.width, job.segment - 1
    tail = min((BLOCK + 1) / 2, prefix)  # 1 to BLOCK tokens: the last one is always read again
    left = min((BLOCK - 1) / 2, prefix)

    def reads_of(prompts: float, rows: float) -> dict[str, float]:
        return {"prefixes": prompts, "reread": rows - prompts} if rival.l2 else {"prefixes": rows}

    reads = reads_of(prompts, rows)
    first = forward(m, "", rows, tail, prefix=prefix - tail, own=tail, **reads)
    decode = forward(m, "", rows, prefix=prefix, own=job.segment / 2, calls=steps, **reads)
    score = left + job.segment

    def scored(w: Wave) -> list[Kernel]:
        reads = reads_of(w.prompts, w.rows)
        return forward(m, "", w.rows, score, prefix=prefix - left, own=score, head=False, **reads)

    first += segment_sample(m, "", rows, rows, 1, filtered=True)
    decode += segment_sample(m, "", rows, rows, steps, filtered=True)
    judged = [Pass(1, scored(w), w.happens) for w in waves(job, prompts, shape)]
    return [Pass(1, first), Pass(steps, decode), *judged]


def perfect_seconds(gpu: Gpu, kernels: Sequence[Kernel], given: Values) -> float:
    """In vLLM's favour: no cost of launches, and element-wise kernels take no time."""
    flawless = perfect(given)
    return sum(k.seconds(gpu, flawless) for k in kernels if "element-wise" not in k.name)


def vllm_seconds(gpu: Gpu, passes: Sequence[Pass], rows: float, given: Values, rival: Rival = RIVALS[0]) -> float:
    """Of a round. In vLLM's favour: its CPU hides behind the GPU, and its bookkeeping takes no longer than ours."""
    seconds = given.host_seconds + (given.request_seconds * rows if rival.requests else 0)
    return seconds + sum(
        happens * max(steps * given.cpu_seconds, perfect_seconds(gpu, kernels, given))
        for steps, kernels, happens in passes
    )
