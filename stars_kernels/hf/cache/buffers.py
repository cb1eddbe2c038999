"""Memory that outlives a call: the next one takes it over, and with it the CUDA graphs that work on it."""

from __future__ import annotations

import torch
from torch import Tensor


class Buffers:
    """The tensors of a model's cache, by name; each is kept until it does not suffice, or until `clear`."""

    def __init__(self) -> None:
        self._kept: dict[object, Tensor] = {}
        self._parts: dict[object, Buffers] = {}

    def part(self, name: object) -> Buffers:
        """Return the buffers of a part, another model, with names of their own."""
        return self._parts.setdefault(name, Buffers())

    def take(self, name: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor of at least this shape, whatever it holds: the kept one, where that is large enough."""
        kept = self._kept.get(name)
        if kept is not None and kept.dtype == dtype and kept.device == device and kept.dim() == len(shape):
            if all(have >= size for have, size in zip(kept.shape, shape, strict=True)):
                return kept
        kept = None
        self._kept.pop(name, None)  # first, so that there is room for the new one
        self._kept[name] = torch.empty(shape, dtype=dtype, device=device)
        return self._kept[name]

    def grow_arenas(self, before: int, after: int) -> None:
        """Make the arenas that have room for `before` tokens, of this and all parts, as large as `after` at least.

        What they hold stays.
        """
        for name, kept in self._kept.items():
            size = (
                kept.shape[2] if isinstance(name, tuple) and name[0] == "arena" else after
            )  # [pairs, 2, tokens, H, D]
            if before <= size < after:  # more than `before` where earlier calls needed it
                larger = kept.new_empty(*kept.shape[:2], after, *kept.shape[3:])
                larger[:, :, :size] = kept
                self._kept[name] = larger
        for part in self._parts.values():
            part.grow_arenas(before, after)

    def drop(self, name: object) -> None:
        """Keep this one no longer."""
        self._kept.pop(name, None)

    def clear(self) -> None:
        """Keep nothing."""
        self._kept.clear()
        for part in self._parts.values():
            part.clear()

    def bytes_on(self, device: torch.device) -> int:
        """Return the bytes that are kept on a device."""
        own = sum(tensor.nbytes for tensor in self._kept.values() if tensor.device == device)
        return own + sum(part.bytes_on(device) for part in self._parts.values())
