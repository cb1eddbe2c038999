"""What the model of `roofline` takes for granted: each number with a fast, a middle and a slow end, and its source.

`values(shared, own)` picks an end of each: `shared` for what the GPU does to everybody, `own` for what touches one
contestant alone. None of these numbers was measured by this project.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

End = Literal["fast", "middle", "slow"]
ENDS: tuple[End, ...] = ("fast", "middle", "slow")
ELSEWHERE, ESTIMATE, CODE = "measured elsewhere", "estimate", "from the code"


class Assumption(NamedTuple):
    fast: float
    middle: float
    slow: float
    unit: str
    touches: Literal["all", "ours", "vLLM"]
    source: str
    """`ELSEWHERE` or `ESTIMATE`, then of what."""


ASSUMPTIONS = {
    "bandwidth_share": Assumption(
        0.9, 0.8, 0.7, "of the datasheet's bandwidth", "all", f"{ELSEWHERE}: what copies and long reads reach"
    ),
    "flops_share": Assumption(
        0.7, 0.6, 0.5, "of the datasheet's dense rates", "all", f"{ELSEWHERE}: what large cuBLAS products reach"
    ),
    "ridge": Assumption(
        1.1, 1.3, 1.5, "x the larger limit, where two limits are equal", "all",
        f"{ESTIMATE}: products of about 192 rows take 1.3x of max(bytes, operations)",
    ),
    "host_seconds": Assumption(
        1e-3, 2e-3, 4e-3, "s a round", "all", f"{ESTIMATE}: results to the host, bookkeeping of the attempts"
    ),
    "issue_seconds": Assumption(
        15e-6, 18e-6, 25e-6, "s of the host for an eager launch", "ours",
        f"{ESTIMATE}: transformers' modules, hooks and the cache around a launch; PyTorch alone takes 5 to 10 us",
    ),
    "gap_seconds": Assumption(
        1.0e-6, 1.3e-6, 1.6e-6, "s of the GPU between two kernels, in a graph too", "ours",
        f"{ELSEWHERE}: 1.3 us inside CUDA graphs",
    ),
    "small_kernel_seconds": Assumption(
        0.7e-6, 1.5e-6, 2.5e-6, "s that the smallest kernel runs", "ours",
        f"{ESTIMATE}: load, a few dependent reads of L2, store",
    ),
    "attention_share": Assumption(
        0.8, 0.45, 0.35, "of a roofline's speed that fork_attention reaches", "ours",
        f"{ESTIMATE}: one program a multiprocessor, by the registers in docs/gpu_build.md",
    ),
    "search_seconds": Assumption(
        5e-6, 11e-6, 18e-6, "s of one search of segment_sample for a threshold (two a filtered draw)", "ours",
        f"{ESTIMATE}: one program a row, about 10 dependent passes of 8 thresholds each",
    ),
    "node_seconds": Assumption(
        1e-6, 3e-6, 10e-6, "s to instantiate and upload a node of a graph, beside issuing it", "ours",
        f"{ESTIMATE}; vLLM's 35 one-step graphs in 14 s are of the same order",
    ),
    "cpu_seconds": Assumption(
        0.5e-3, 1e-3, 3e-3, "s of vLLM's CPU a step, hidden behind the GPU where that takes longer", "vLLM",
        f"{ELSEWHERE}: 2 to 5 ms are reported; the fast and middle ends are in vLLM's favour",
    ),
    "request_seconds": Assumption(
        50e-6, 100e-6, 200e-6, "s of vLLM's CPU for a row of a round, in `requests` alone", "vLLM",
        f"{ESTIMATE}: admission, scheduling, detokenisation and output of a sample",
    ),
    "l2_speed": Assumption(
        4.0, 2.0, 1.5, "x the bandwidth, at which a prefix is read again from L2 (vLLM's: in `L2` alone)", "all",
        f"{ELSEWHERE}: about 5.5 TB/s on an H100",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Values:
    """One number for each of `ASSUMPTIONS`, in its unit."""

    bandwidth_share: float
    flops_share: float
    ridge: float
    host_seconds: float
    issue_seconds: float
    gap_seconds: float
    small_kernel_seconds: float
    attention_share: float
    search_seconds: float
    node_seconds: float
    cpu_seconds: float
    request_seconds: float
    l2_speed: float


@cache
def perfect(given: Values) -> Values:
    """Return the same GPU under kernels without flaw: what vLLM's are taken for."""
    return replace(given, gap_seconds=0.0, small_kernel_seconds=0.0, attention_share=1.0, search_seconds=0.0)


@cache
def values(shared: End = "middle", own: End = "middle") -> Values:
    return Values(**{name: getattr(a, shared if a.touches == "all" else own) for name, a in ASSUMPTIONS.items()})


def listed() -> list[dict[str, object]]:
    """Return the table of assumptions."""

    def shown(value: float, unit: str) -> str:
        if unit.split()[0] != "s":
            return f"{value:g}"
        return f"{value * 1e3:g} ms" if value >= 1e-3 else f"{value * 1e6:g} us"

    return [
        {
            "name": name,
            **{end: shown(getattr(a, end), a.unit) for end in ENDS},
            "what": a.unit.removeprefix("s of ").removeprefix("s "),
            "touches": a.touches,
            "source": a.source,
        }
        for name, a in ASSUMPTIONS.items()
    ]
