"""Numbers between host and device, many in one copy: a GPU's host waits for a read, and never for an upload."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    words = torch.cat([_words(tensor).to(tensors[0].device) for tensor in tensors]).cpu()
    parts = words.split([tensor.numel() for tensor in tensors])
    return [
        _values(part, tensor.dtype).view(tensor.shape).tolist() for part, tensor in zip(parts, tensors, strict=True)
    ]


def rows_of(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Return these rows of a tensor [R, ...], in rising order: itself, where they are all of them."""
    if len(rows) == len(tensor):
        return tensor
    (index,) = to_device([rows], tensor.device)
    return tensor.index_select(0, index)


def _words(tensor: Tensor) -> Tensor:
    """Return a tensor as int64 [numel]: by value or, of a float64, by bits."""
    if tensor.dtype not in (torch.float64, torch.int64, torch.bool):
        raise TypeError(f"a tensor of {tensor.dtype}, expected float64, int64 or bool")
    flat = tensor.reshape(-1)
    return flat.view(torch.int64) if tensor.dtype == torch.float64 else flat.long()


def _values(words: Tensor, dtype: torch.dtype) -> Tensor:
    return words.view(dtype) if dtype == torch.float64 else words.to(dtype)
