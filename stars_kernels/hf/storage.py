"""Where keys and values lie: groups of planes of one shape, and what a running forward needs to know of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stars_kernels.hf.layout import Plane


@dataclass(frozen=True)
class Span:
    """A part of a packed forward: the next tokens of one prompt, and where they go."""

    tokens: slice
    slots: slice
    prompt: Tensor  # [1]
    count: Tensor  # [1]


@dataclass(frozen=True)
class Suffix:
    """A forward of a few tokens a row, stored in the suffixes' `slots`."""

    slots: slice
    query_len: Tensor  # [R]
    suffix_len: Tensor  # [R]


@dataclass
class Place:
    """The bookkeeping on one device: the cache's own, or a copy on another device of a model that has several."""

    device: torch.device
    offsets: Tensor  # [P]
    lengths: Tensor  # [P]
    prompt: Tensor  # [R]
    plan: list[Span] | Suffix | None = None


@dataclass(slots=True)
class BoundLayer:
    """One attention call's storage, as it lies for the open rows."""

    place: Place
    arena_keys: Tensor  # [N, Hkv, Dk]
    arena_values: Tensor  # [N, Hkv, Dv]
    keys: Tensor  # [R, T, Hkv, Dk]
    values: Tensor  # [R, T, Hkv, Dv]
    softcap: float
    sinks: Tensor | None
    stores: bool


class Group:
    """The storage of all planes (a layer's keys, or its values) of one shape, dtype and device, two by two."""

    def __init__(self, plane: Plane, planes: int, slots: int, segment_size: int) -> None:
        heads, size, dtype, self.device = plane
        pairs = -(-planes // 2)
        self.arena = torch.empty(pairs, 2, slots, heads, size, dtype=dtype, device=self.device)
        self.suffix = self.arena.new_empty(pairs, 2, 0, segment_size, heads, size)
        self.arena_planes = self.arena.flatten(0, 1).unbind()

    def make_room(self, rows: int) -> None:
        """For as many rows; what the rows held before may be lost."""
        pairs, _, have, *shape = self.suffix.shape
        if rows > have:
            self.suffix = self.suffix.new_empty(pairs, 2, rows, *shape)

    def release(self) -> None:
        self.suffix = self.suffix[:, :, :0].clone()

    def close(self) -> None:
        self.arena = self.suffix = self.arena.new_empty(0)
        self.arena_planes = ()

    def suffix_planes(self, rows: slice) -> tuple[Tensor, ...]:
        """[R, T, Hkv, D] of each plane."""
        return self.suffix.flatten(0, 1)[:, rows].unbind()
