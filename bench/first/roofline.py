"""All that `first` takes from the roofline: sizes, a round's kernels, and what they would take on a GPU."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from bench.kernels import BANDWIDTH_SHARE, BF16, FLOPS_SHARE, GPUS, MODELS, Gpu, Kernel, Model
from bench.rounds import GAP_SECONDS, HOST_SECONDS, ISSUE_SECONDS, Job, ours, prefill, round_seconds

__all__ = ["GAP_SECONDS", "ISSUE_SECONDS", "SIZES", "Gpu", "Kernel", "Model", "Shape", "kernels", "linear"]

SIZES = {"tiny": Model("tiny", 2, 64, 4, 2, 16, 128, 512), **MODELS}
SEGMENT = 15
MEMORY_TOLERANCE = 0.15
"""Of a datasheet's, that a GPU of the name may be off: another variant is off by more."""


@dataclass(frozen=True)
class Shape:
    """A round's: `prompts` of `prompt_tokens`, `width` attempts of each side by side."""

    prompts: int
    width: int
    prompt_tokens: int

    @property
    def rows(self) -> int:
        return self.prompts * self.width

    @property
    def prefix(self) -> int:
        """Of a prompt in the third round, when one segment after the other is accepted."""
        return self.prompt_tokens + 2 * SEGMENT

    def __str__(self) -> str:
        return f"{self.prompts} x {self.width}"


def datasheet(name: str, memory: float) -> Gpu | None:
    """Return the roofline's GPU of this name and memory in bytes, None where it has none."""
    for key, gpu in GPUS.items():
        same = re.search(rf"\b{key}\b", name.lower()) and "pcie" not in name.lower()
        if same and abs(memory / gpu.memory - 1) <= MEMORY_TOLERANCE:
            return gpu
    return None


def measured(copy: float, gemm: float) -> Gpu:
    """Return a device of which only these rates, bytes and operations a second, are known; others cost nothing."""
    return Gpu("rates measured here", copy / BANDWIDTH_SHARE, gemm / FLOPS_SHARE, math.inf, math.inf)


def bandwidth(gpu: Gpu | None) -> float | None:
    return None if gpu is None else BANDWIDTH_SHARE * gpu.bandwidth


def linear(rows: int, columns: int, depth: int) -> Kernel:
    """Return a linear layer's work on `rows` tokens."""
    moved = columns * depth + rows * (columns + depth)
    return Kernel("linear", BF16 * moved, 2 * rows * columns * depth)


def kernels(model: Model, shape: Shape, *, filtered: bool = True, fused: bool = False) -> dict[str, Kernel]:
    """Return the kernels of a round in which every prompt's segment is decided, by name.

    filtered: draws with top-k, else at a temperature alone; fused: those, with the output layer in the same kernel.
    """
    found = ours(_job(model, shape), shape.prompts, shape.width, shape.prefix, filtered=filtered, fused_head=fused)
    return {kernel.name: kernel for kernel in found}


def call_seconds(gpu: Gpu | None, kernel: Kernel, *, graph: bool = False) -> float | None:
    """Return the seconds of one call: in a graph, or issued by the host."""
    if gpu is None:
        return None
    work = max(kernel.limits(gpu).values()) + GAP_SECONDS * kernel.launches
    return work if graph else max(work, ISSUE_SECONDS * kernel.launches)


def whole_seconds(gpu: Gpu | None, model: Model, shape: Shape, *, graph: bool) -> float | None:
    """Return the seconds of a round."""
    return None if gpu is None else round_seconds(gpu, list(kernels(model, shape).values()), graph)


def phase_seconds(gpu: Gpu | None, model: Model, shape: Shape, phase: str, *, graph: bool) -> float | None:
    """Return the seconds of a part of a round: "last token", "segment" or "RM"."""
    if gpu is None:
        return None
    part = [kernel for kernel in kernels(model, shape).values() if kernel.phase == phase]
    return round_seconds(gpu, part, graph) - HOST_SECONDS


def prefill_seconds(gpu: Gpu | None, model: Model, shape: Shape) -> float | None:
    """Return the seconds in which both models read the prompts."""
    return None if gpu is None else round_seconds(gpu, prefill(_job(model, shape)), graph=False)


def _job(model: Model, shape: Shape) -> Job:
    """Of which bytes and operations are asked: they are the same on every GPU."""
    return Job(next(iter(GPUS.values())), model, shape.prompts, shape.prompt_tokens, SEGMENT, acceptance=1.0)
