"""Out of memory: how it is known, and how far a run shrinks for it."""

from __future__ import annotations

import dataclasses
import traceback
import warnings
from dataclasses import dataclass

import torch

_WORDS = ("can't allocate memory", "not enough memory", "std::bad_alloc", "CUDA error: out of memory", "ALLOC_FAILED")
"""Of the plain RuntimeErrors of torch's CPU allocator, of C++, of CUDA and of its libraries (cuBLAS, cuDNN)."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or one that led to it, says so: less work at once may then succeed."""
    if error is None:
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS):
        return True
    return is_out_of_memory(error.__cause__ or error.__context__)


def forget_frames(error: BaseException | None) -> None:
    """Let go of what the frames behind `error` hold (models' caches and tensors); its traceback stays readable."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def free_memory() -> None:
    """Hand torch's unused blocks back to the GPUs, so that they can be cut anew."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@dataclass
class MemoryLimits:
    """What a run does side by side, at most; None = as configured. Halved where memory runs out, for good.

    batch_size: prompts of a batch. prompts: of these, in a round. width: attempts of each.
    """

    batch_size: int | None = None
    prompts: int | None = None
    width: int | None = None

    @property
    def halved(self) -> dict[str, int]:
        return {name: limit for name, limit in dataclasses.asdict(self).items() if limit is not None}

    def halve_batch(self, prompts: int) -> None:
        """There was no memory for a batch of `prompts` > 1."""
        self.batch_size = prompts // 2
        _warn(f"as a batch of {prompts} prompts began", f"batch_size={self.batch_size}")

    def halve_round(self, prompts: int, width: int) -> None:
        """There was no memory for a round of `prompts` x `width` > 1 rows."""
        happened = f"in a round of {prompts} prompts x {width} attempts"
        if width > 1:
            self.width = width // 2
            _warn(happened, f"width={self.width}")
        else:
            self.prompts = prompts // 2
            _warn(happened, f"prompts={self.prompts} in a round")


def _warn(happened: str, rest: str) -> None:
    warnings.warn(f"out of memory {happened}: going on with {rest}", RuntimeWarning, stacklevel=3)
