"""All that `first` takes from the roofline: sizes, a round's kernels, and what they would take on a GPU."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from bench.assumptions import values
from bench.costs import issued_seconds, ours, prefill, round_seconds
from bench.kernels import Kernel
from bench.schedule import Job
from bench.sizes import BF16, GPUS, MODELS, Gpu, Model

GIVEN = values()
"""What the roofline takes for granted, in the middle of each band."""
GAP_SECONDS, ISSUE_SECONDS = GIVEN.gap_seconds, GIVEN.issue_seconds

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
    return Gpu("rates measured here", copy / GIVEN.bandwidth_share, gemm / GIVEN.flops_share, math.inf, math.inf)


def bandwidth(gpu: Gpu | None) -> float | None:
    return None if gpu is None else GIVEN.bandwidth_share * gpu.bandwidth


def linear(rows: int, columns: int, depth: int) -> Kernel:
    """Return a linear layer's work on `rows` tokens."""
    moved = columns * depth + rows * (columns + depth)
    return Kernel("linear", BF16 * moved, 2 * rows * columns * depth)


def kernels(model: Model, shape: Shape, *, filtered: bool = True, fused: bool = False) -> dict[str, Kernel]:
    """Return the ops of a round in which every prompt's segment is decided, by name; all launches of one are summed.

    filtered: draws with top-k, else at a temperature alone; fused: those, with the output layer in the same kernel.
    """
    found: dict[str, Kernel] = {}
    for kernel in _round(model, shape, filtered=filtered, fused_head=fused):
        phase, launched = kernel.name.split(": ")
        name = f"{phase}: {launched.split()[0]}"  # of "step: segment_sample draw" its op
        one = found.get(name)
        found[name] = kernel._replace(name=name) if one is None else one._replace(
            bytes=one.bytes + kernel.bytes, flops=one.flops + kernel.flops,
            vector_flops=one.vector_flops + kernel.vector_flops, l2_bytes=one.l2_bytes + kernel.l2_bytes,
            launches=one.launches + kernel.launches, searches=one.searches + kernel.searches,
        )  # fmt: skip
    return found


def call_seconds(gpu: Gpu | None, kernel: Kernel, *, graph: bool = False) -> float | None:
    """Return the seconds of one call: in a graph, or issued by the host."""
    if gpu is None:
        return None
    work = kernel._replace(calls=1).seconds(gpu, GIVEN) + GAP_SECONDS * kernel.launches
    return work if graph else max(work, ISSUE_SECONDS * kernel.launches)


def whole_seconds(gpu: Gpu | None, model: Model, shape: Shape, *, graph: bool) -> float | None:
    """Return the seconds of a round."""
    return None if gpu is None else round_seconds(gpu, _round(model, shape), graph, GIVEN)


def phase_seconds(gpu: Gpu | None, model: Model, shape: Shape, phase: str, *, graph: bool) -> float | None:
    """Return the seconds of a part of a round: "last token", "segment" or "RM"."""
    if gpu is None:
        return None
    part = [kernel for kernel in _round(model, shape) if kernel.phase == phase]
    return issued_seconds(gpu, part, graph, GIVEN)


def prefill_seconds(gpu: Gpu | None, model: Model, shape: Shape) -> float | None:
    """Return the seconds in which both models read the prompts."""
    return None if gpu is None else issued_seconds(gpu, prefill(_job(model, shape)), False, GIVEN)


def _round(model: Model, shape: Shape, **how: bool) -> list[Kernel]:
    return ours(_job(model, shape), shape.prompts, shape.width, shape.prefix, **how)


def _job(model: Model, shape: Shape) -> Job:
    """Of which bytes and operations are asked: they are the same on every GPU."""
    return Job(next(iter(GPUS.values())), model, shape.prompts, shape.prompt_tokens, SEGMENT, acceptance=1.0)
