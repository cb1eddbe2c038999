"""Checks at the ops' public edge: each names the value found and what was expected."""

from __future__ import annotations

from torch import Tensor, dtype


def check_shape(name: str, tensor: Tensor, *expected: int | None) -> None:
    """Refuse a tensor of another shape; `expected` has one entry per dimension, None admits any size."""
    found = tensor.shape
    if len(found) == len(expected):
        for size, wanted in zip(found, expected, strict=True):  # a plain loop: ops run thousands of times a second
            if wanted is not None and size != wanted:
                break
        else:
            return
    sizes = ", ".join("*" if e is None else str(e) for e in expected)
    raise ValueError(f"{name} has shape {list(found)}, expected [{sizes}]")


def check_dtype(name: str, tensor: Tensor, *expected: dtype) -> None:
    if tensor.dtype not in expected:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {' or '.join(map(str, expected))}")


def check_range(name: str, indices: Tensor, least: int, most: int) -> None:
    """Waits for the device: for definitions alone."""
    wrong = indices[(indices < least) | (indices > most)].tolist()
    if wrong:
        raise IndexError(f"{name}: expected {least} to {most}, found {wrong[0]}")


def check_device(device_of: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device_of.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device_of.device}")
