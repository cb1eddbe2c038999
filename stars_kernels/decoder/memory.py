"""Out of memory: how it is known, and how far a run shrinks for it."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from dataclasses import dataclass

import torch

from stars_kernels.decoder.errors import causes, message_of

_WORDS = ("can't allocate memory", "not enough memory", "std::bad_alloc", "CUDA error: out of memory", "ALLOC_FAILED")
"""Of the plain RuntimeErrors of torch's CPU allocator, of C++, of CUDA and of its libraries (cuBLAS, cuDNN)."""

ALLOCATOR_LOCK = threading.Lock()
"""Held while a CUDA graph is captured (torch allows one capture a process at a time), and while unused blocks are
handed back: asked for that in the middle of another thread's capture, torch's allocator fails an assertion."""


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether `error`, or what it was explicitly raised from, is of memory: less work at once may then succeed.

    What was handled while it was raised does not count: it may be the caller's, and over.
    """
    return any(
        isinstance(link, torch.OutOfMemoryError | MemoryError)
        or (isinstance(link, RuntimeError) and any(words in message_of(link) for words in _WORDS))
        for link in causes(error)
    )


def free_memory() -> None:
    """Hand torch's unused blocks back to the GPUs, so that they can be cut anew; waits for a capture to end."""
    if torch.cuda.is_initialized():
        with ALLOCATOR_LOCK:
            torch.cuda.empty_cache()


@dataclass
class MemoryLimits:
    """What a run does side by side, at most; None = as configured. Reduced where memory runs out, for good.

    batch_size: prompts. width: attempts of each.
    """

    batch_size: int | None = None
    width: int | None = None

    @property
    def halved(self) -> dict[str, int]:
        return {name: limit for name, limit in dataclasses.asdict(self).items() if limit is not None}

    def admit_fewer(self, prompts: int, others: int) -> None:
        """There was no memory for `prompts` more prompts beside `others`, in all more than one, or for the largest."""
        self.batch_size = max(1, others + prompts // 2)
        beside = f" beside {others} others" if others else ""
        _warn(f"as {prompts} prompts were admitted{beside}", f"batch_size={self.batch_size}")

    def halve_round(self, prompts: int, width: int) -> None:
        """There was no memory for a round of `prompts` x `width` > 1 rows."""
        happened = f"in a round of {prompts} prompts x {width} attempts"
        if width > 1:
            self.width = width // 2
            _warn(happened, f"width={self.width}")
        else:
            self.batch_size = prompts // 2
            _warn(happened, f"batch_size={self.batch_size}")


def _warn(happened: str, rest: str) -> None:
    warnings.warn(f"out of memory {happened}: going on with {rest}", RuntimeWarning, stacklevel=3)
