"""Numbers between host and device, many in one copy: a GPU's host waits for a read, and never for an upload."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor


def to_device(
    columns: Sequence[Sequence[float]], device: torch.device, dtype: torch.dtype = torch.int64
) -> tuple[Tensor, ...]:
    """Upload lists of numbers as tensors [len(column)] of `dtype` that share their memory."""
    numbers = torch.tensor(list(chain.from_iterable(columns)), dtype=dtype)
    if device.type == "cuda":  # a copy from memory that is not pinned waits for all work before it
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True).split([len(column) for column in columns])


def to_host(tensors: Iterable[Tensor]) -> list[list[Any]]:
    """Read float64, int64 or bool tensors as (nested) lists; one wait for those of the first one's device."""
    tensors = list(tensors)
    return _values(_words(tensors).cpu(), tensors)


class Reading:
    """Tensors on their way to the host, which may do other things meanwhile; they may be written again at once."""

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        """columns: float64, int64 or bool, on one device."""
        self._kinds = {name: torch.empty_like(column, device="meta") for name, column in columns.items()}
        words = _words(list(columns.values()))
        self._arrived: torch.cuda.Event | None = None
        if words.device.type == "cuda":
            self._words = torch.empty(words.shape, dtype=words.dtype, pin_memory=True)
            self._words.copy_(words, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(words.device))
        else:
            self._words = words

    def wait(self) -> dict[str, list[Any]]:
        """Return (nested) lists by name, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return dict(zip(self._kinds, _values(self._words, list(self._kinds.values())), strict=True))


def rows_of(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Return these rows of a tensor [R, ...], in rising order: itself, where they are all of them."""
    if len(rows) == len(tensor):
        return tensor
    (index,) = to_device([rows], tensor.device)
    return tensor.index_select(0, index)


def _words(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors end to end as int64, on the device of the first: by value or, of a float64, by bits."""
    parts = []
    for tensor in tensors:
        if tensor.dtype not in (torch.float64, torch.int64, torch.bool):
            raise TypeError(f"a tensor of {tensor.dtype}, expected float64, int64 or bool")
        flat = tensor.reshape(-1)
        parts.append((flat.view(torch.int64) if tensor.dtype == torch.float64 else flat.long()).to(tensors[0].device))
    return torch.cat(parts)


def _values(words: Tensor, kinds: Sequence[Tensor]) -> list[list[Any]]:
    """Return the lists of what `_words` has put end to end; kinds: tensors of the same shapes and dtypes."""
    parts = words.split([kind.numel() for kind in kinds])
    return [
        (part.view(kind.dtype) if kind.dtype == torch.float64 else part.to(kind.dtype)).view(kind.shape).tolist()
        for part, kind in zip(parts, kinds, strict=True)
    ]
