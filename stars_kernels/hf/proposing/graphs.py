"""CUDA graphs: to read a token of every row and to draw the next is one launch, and so is a reward model's pass.

A step is static: nothing in it waits for the host, and what changes (which slots, attempts and positions, and which
step it is) is read from a few tensors, and written to others, that stay where they are. So one graph serves all steps
of all rounds, and as rows are padded to a bucket, few graphs serve all numbers of rows. A pass is static in the same
way. Capturing needs every kernel compiled, so a bucket's first step runs eagerly and its second is captured.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from stars_kernels.decoder.memory import ALLOCATOR_LOCK
from stars_kernels.decoder.protocols import Rows
from stars_kernels.hf.cache.buffers import Buffers

Result = TypeVar("Result")
Work = Callable[[], None]
"""Reads and writes nothing that changes, but for what lies in buffers that stay where they are."""
Capture = Callable[[Work], Work]
"""Work -> what does the same on the same memory, time and again. The work's Python runs once, and with no effect."""


MAX_GRAPHS = 64
"""Kept at a time: each holds some memory, and an engine may see rows of many numbers and settings of many kinds."""


def bucket_of(rows: int) -> int:
    """Rows after padding: four buckets between powers of two, so less than a quarter is padding."""
    step = max(1, 1 << max(rows.bit_length() - 3, 0))
    return -(-rows // step) * step


def padded(rows: Rows, count: int) -> Rows:
    """`rows` with its last one repeated up to `count`; still grouped by slot."""
    index = torch.arange(count, device=rows.slot.device).clamp(max=len(rows) - 1)
    slots = [*rows.slots, *[rows.slots[-1]] * (count - len(rows))]
    return rows.map(lambda column: column[index], slots)


@functools.cache
def streams_of(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Make the streams that a device's graphs are captured on and replayed on, once for the process.

    torch keeps a workspace (32 MiB on Hopper) for each cuBLAS handle and stream that ever met, so streams must be few.
    Graphs captured on one stream share its workspace, so no two of them may run at once, whatever streams their callers
    are on: all replays go through one stream. It is not the captures', as nothing may be launched on a stream while
    another thread captures on it.
    """
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class CudaCapture:
    """Captures the graphs of one workspace, in one pool of memory.

    They share it as none is replayed beside another, and none leaves a result in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, run: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with ALLOCATOR_LOCK, torch.cuda.device(self._device):
            own, replays = streams_of(self._device)
            capture = torch.cuda.graph(graph, pool=self._pool, stream=own, capture_error_mode="thread_local")
            captured(run, capture)

        def replay() -> None:
            caller = torch.cuda.current_stream(replays.device)
            replays.wait_stream(caller)
            with torch.cuda.stream(replays):
                graph.replay()
            caller.wait_stream(replays)

        return replay


def captured(run: Callable[[], Result], capture: AbstractContextManager[object]) -> Result:
    """Return run()'s result, called inside of `capture`.

    Where run() fails, the end of the capture fails too, with an error that does not say why: it gets run()'s as cause.
    """
    cause: Exception | None = None
    try:
        with capture:
            try:
                return run()
            except Exception as error:
                cause = error
                raise
    except Exception as error:
        if cause is None or error is cause:
            raise
        raise error from cause


@dataclass
class Counts:
    """What graphs have cost and saved; seconds: of the host, for the captures."""

    captures: int = 0
    seconds: float = 0.0
    replays: int = 0

    def __sub__(self, other: Counts) -> Counts:
        return Counts(self.captures - other.captures, self.seconds - other.seconds, self.replays - other.replays)

    def __str__(self) -> str:
        return f"{self.captures} captured in {self.seconds:.2f} s, {self.replays} replays"


class Graphs:
    """The graphs of one model and one place in memory, the newest MAX_GRAPHS of them."""

    def __init__(self, capture: Capture, counts: Counts | None = None) -> None:
        """counts: what this one's captures and replays are added to; None = its own."""
        self.capture = capture
        self.counts = Counts() if counts is None else counts
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, Work] = {}
        self._storage: object = None
        self._parts: dict[object, Graphs] = {}

    def part(self, name: object) -> Graphs:
        """Return the graphs of another model, which are counted and cleared with these."""
        return self._parts.setdefault(name, Graphs(self.capture, self.counts))

    @property
    def holds(self) -> Sequence[Hashable]:
        """Return the keys of what is captured, the oldest first; those of parts are not among them."""
        return list(self._captured)

    def keep(self, *tensors: Tensor) -> None:
        """Forget the graphs unless all that they work on, these tensors, lies where it did, and as it did."""
        storage = [(t.untyped_storage().data_ptr(), t.storage_offset(), t.dtype, t.stride()) for t in tensors]
        if storage != self._storage:
            self._forget()
            self._storage = storage

    def run(self, key: Hashable, work: Work) -> None:
        """Do the work, from a graph where there is one. key: all that it is a function of, but for `keep`'s tensors."""
        if key not in self._seen:
            work()
            self._seen.add(key)
            return
        if key not in self._captured:
            while len(self._captured) >= MAX_GRAPHS:
                self._captured.pop(next(iter(self._captured)))
            began = time.perf_counter()
            self._captured[key] = self.capture(work)
            self.counts.captures += 1
            self.counts.seconds += time.perf_counter() - began
        self._captured[key]()
        self.counts.replays += 1

    def clear(self) -> None:
        """Forget all graphs, those of parts too, and the memory that they hold."""
        self._forget()
        for part in self._parts.values():
            part.clear()

    def _forget(self) -> None:
        self._seen.clear()
        self._captured.clear()


class Kept:
    """Memory that stays, with the graphs that work on it: the place of `decoder.device_rounds`."""

    def __init__(self, device: torch.device, buffers: Buffers, graphs: Graphs) -> None:
        self.device, self.buffers, self.graphs = device, buffers, graphs

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of this shape, a part of the one that was taken before where that is large enough."""
        *outer, last = shape
        room = 1 << max(last - 1, 0).bit_length()  # so that a little more seldom needs new memory
        return self.buffers.take(name, (*outer, room), dtype, self.device)[..., :last]

    def run(self, key: Hashable, work: Work, tensors: Sequence[Tensor]) -> None:
        """Do the work, from a graph where there is one; tensors: all that it works on."""
        self.graphs.keep(*tensors)
        self.graphs.run(key, work)
