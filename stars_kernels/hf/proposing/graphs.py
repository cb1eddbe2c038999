"""Whole segments as CUDA graphs: every forward, draw and feed-back of `segment_size` tokens is one launch.

A segment is static: its length is known, nothing in it waits for the host, and what changes from round to round (which
slots, attempts and positions) is read from a few tensors. Rows are padded to a bucket, so that few graphs serve all
rounds. Capturing needs every kernel compiled, so a bucket's first segment runs eagerly and its second is captured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from stars_kernels.decoder.memory import ALLOCATOR_LOCK
from stars_kernels.decoder.protocols import Rows

Tensors = tuple[Tensor, ...]
Segment = Callable[[Rows], Tensors]
"""Rows -> what was drawn; reads nothing else that changes, but for what lies in buffers that stay where they are."""
Capture = Callable[[Callable[[], Tensors]], Callable[[], Tensors]]
"""A function without arguments -> one that does the same on the same memory, and returns the same tensors."""


MAX_GRAPHS = 64
"""Kept at a time: each holds some memory, and an engine may see segments of many sizes."""


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

    Two workspaces cannot share a pool: a graph's result lies in it until it is copied, and a replay of the other's may
    come first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensors]) -> Callable[[], Tensors]:
        graph = torch.cuda.CUDAGraph()
        with ALLOCATOR_LOCK, torch.cuda.device(self._device):
            own, replays = streams_of(self._device)
            capture = torch.cuda.graph(graph, pool=self._pool, stream=own, capture_error_mode="thread_local")
            result = captured(run, capture)

        def replay() -> Tensors:
            caller = torch.cuda.current_stream(replays.device)
            replays.wait_stream(caller)
            with torch.cuda.stream(replays):
                graph.replay()
            caller.wait_stream(replays)
            return result

        return replay


def captured(run: Callable[[], Tensors], capture: AbstractContextManager[object]) -> Tensors:
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


class SegmentGraphs:
    """The captured segments of one model and one place in memory, the newest MAX_GRAPHS of them."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self._seen: set[object] = set()
        self._captured: dict[object, tuple[Rows, Callable[[], Tensors]]] = {}
        self._storage: object = None
        self.replays = 0

    def run(self, segment: Segment, rows: Rows, settings: object, storage: object) -> Tensors:
        """segment(rows), from a graph where there is one.

        settings: whatever else the segment is a function of. storage: names the buffers that it works on; once they
        have moved, graphs of the old ones are worth nothing.
        """
        if storage != self._storage:
            self.clear()
            self._storage = storage
        key = (len(rows), settings)
        if key not in self._seen:
            drawn = segment(rows)
            self._seen.add(key)
            return drawn
        if key not in self._captured:
            while len(self._captured) >= MAX_GRAPHS:
                self._captured.pop(next(iter(self._captured)))
            static = rows.map(torch.clone, slots=())  # which change from round to round: a segment reads none
            self._captured[key] = static, self.capture(lambda: segment(static))
        static, replay = self._captured[key]
        for place, column in zip(static.columns, rows.columns, strict=True):
            place.copy_(column)
        self.replays += 1
        return tuple(tensor.clone() for tensor in replay())

    def clear(self) -> None:
        """Forget all graphs, and the memory that they hold."""
        self._seen.clear()
        self._captured.clear()
