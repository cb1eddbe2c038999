"""Seconds of a call: between two events on a GPU, by the clock on a CPU; the median of repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.machine import wait

MIN_REPEATS = 3
EVENT_CALLS = 10
"""Of one repeat on a GPU: launches that the host issues ahead hide behind the kernels before them."""
GRAPH_CALLS = 20
"""In a graph, at least."""
SECONDS = {"cpu": 0.005, "cuda": 0.15}
"""Of one measurement, about."""


@dataclass(frozen=True)
class Timing:
    """Seconds of a call."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        return cls(statistics.median(seconds), min(seconds), max(seconds))


class Clock:
    """Times calls on one device. `work` takes a number below `copies`: the data it uses, so that none is in a cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def kind(self) -> str:
        """Return cpu or cuda."""
        return self.device.type

    def launched(self, work: Callable[[int], Any], copies: int = 1) -> Timing:
        """Time a call that the host issues."""
        calls = EVENT_CALLS if self.kind == "cuda" else 1
        turn = 0

        def some() -> None:
            nonlocal turn
            for _ in range(calls):
                work(turn % copies)
                turn += 1

        return self._repeated(some, calls)

    def replayed(self, work: Callable[[int], Any], copies: int = 1, calls: int = 0) -> Timing:
        """Time a call inside a CUDA graph that holds `calls` of them (default: one for each copy, or more)."""
        calls = calls or max(copies, GRAPH_CALLS)
        work(0)  # compiles what a capture cannot
        wait(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in range(calls):
                work(call % copies)
        return self._repeated(graph.replay, calls)

    def bare(self, work: Callable[[int], Any], copies: int = 1) -> Timing:
        """Time a call without the host's part in it, as far as the device allows: a CPU has no graphs."""
        return self.replayed(work, copies) if self.kind == "cuda" else self.launched(work, copies)

    def whole(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Run `work` once; return its seconds, all that it gives the device included, and its result."""
        wait(self.device)
        began = time.perf_counter()
        result = work()
        wait(self.device)
        return time.perf_counter() - began, result

    def _repeated(self, work: Callable[[], Any], calls: int) -> Timing:
        work()  # warms up
        wait(self.device)
        seconds: list[float] = []
        end = time.perf_counter() + SECONDS[self.kind]
        while time.perf_counter() < end or len(seconds) < MIN_REPEATS:
            seconds.append(self._once(work) / calls)
        return Timing.of(seconds)

    def _once(self, work: Callable[[], Any]) -> float:
        if self.kind == "cpu":
            return self.whole(work)[0]
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
