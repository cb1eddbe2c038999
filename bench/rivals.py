"""vLLM as the strongest rival, assumed better than it is: requests of `width` samples, a second engine for rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bench.assumptions import Values, perfect
from bench.kernels import Gpu, Kernel, forward, segment_sample
from bench.schedule import Job, Wave, waves

BLOCK = 16  # tokens of KV that vLLM caches together


class Rival(NamedTuple):
    """rm_cached: the rewards' engine caches prefixes. l2: a prompt's rows share their prefix there. requests: cost.

    waves: it scores as our `waves` does, in requests of as many columns as are best for it.
    """

    name: str
    what: str
    rm_cached: bool = True
    l2: bool = False
    requests: bool = False
    waves: bool = False


RIVALS = (
    Rival("vLLM", "perfect kernels and graphs, prefix caching, attention reads a prefix from memory for each row"),
    Rival("vLLM, L2", "the same, but rows of one prompt find their prefix in L2 once it was read", l2=True),
    Rival("vLLM, L2, waves", "with L2, and it scores in waves as ours does", l2=True, waves=True),
    Rival("vLLM, requests", "the first with a cost of the CPU for each row of a round", requests=True),
    Rival("vLLM, RM uncached", "the first, but its rewards' engine reads every prefix again", rm_cached=False),
)


class Pass(NamedTuple):
    steps: int
    kernels: list[Kernel]
    happens: float = 1


def vllm(
    job: Job, prompts: float, width: int, prefix: float, rival: Rival = RIVALS[0], wave: int | None = None
) -> list[Pass]:
    """A round: first tokens behind the prefixes, the other steps, then their prefixes in the reward model's engine.

    Full blocks of a prefix are cached, the rest is read again for each row; attention reads a prefix once a row.
    """
    m, rows, steps = job.model, prompts * width, job.segment - 1
    tail = min((BLOCK + 1) / 2, prefix)  # 1 to BLOCK tokens: the last one is always read again
    left = min((BLOCK - 1) / 2, prefix) if rival.rm_cached else prefix

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
    judged = [Pass(1, scored(w), w.happens) for w in waves(job, prompts, width, wave or width)]
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
