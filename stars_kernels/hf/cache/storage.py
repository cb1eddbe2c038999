"""Where keys and values lie: groups of planes of one shape, and what a running forward needs to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stars_kernels.decoder.transfer import to_device
from stars_kernels.hf.cache.buffers import Buffers
from stars_kernels.hf.view.layout import Plane

PREFILL_ROW = 64
"""Queries of a row of a packed forward, at most. A prompt may be cut into rows anywhere: what the CPU's attention gives
a query does not depend, to the bit, on where its prefix ends."""


@dataclass(frozen=True)
class Packed:
    """A forward of N tokens, the next ones of several prompts end to end, cut in R rows of S queries for attention.

    A row has its prompt's tokens before it as a prefix of its own, read from the arena, and its own tokens as suffix.
    """

    positions: Tensor  # [N] of the tokens in their prompts
    where: Tensor  # [N] places in the arena, of their keys and values
    kept: Tensor  # [R * S] the same of each query
    tokens: Tensor  # [R * S] which token each query is; padding repeats a row's first
    queries: Tensor  # [N] which query each token is
    offsets: Tensor  # [R]
    lengths: Tensor  # [R]
    counts: Tensor  # [R] queries that are no padding
    rows: Tensor  # [R] 0, 1, ...: the prefix of each row

    @staticmethod
    def of(starts: Sequence[int], counts: Sequence[int], offsets: Sequence[int], device: torch.device) -> Packed:
        """Read counts[i] tokens of a prompt that has starts[i] already, in the arena from offsets[i] on."""
        size = min(PREFILL_ROW, max(counts))
        positions: list[int] = []
        where: list[int] = []
        tokens: list[int] = []
        queries: list[int] = []
        rows: list[tuple[int, int, int]] = []
        for start, count, offset in zip(starts, counts, offsets, strict=True):
            for done in range(0, count, size):
                n, first, before = min(size, count - done), len(positions), start + done
                queries += range(len(tokens), len(tokens) + n)
                tokens += [*range(first, first + n), *[first] * (size - n)]
                positions += range(before, before + n)
                where += range(offset + before, offset + before + n)
                rows.append((offset, before, n))
        kept = [where[token] for token in tokens]
        columns = (positions, where, kept, tokens, queries, *zip(*rows, strict=True), range(len(rows)))
        return Packed(*to_device(columns, device))

    def in_rows(self, packed: Tensor) -> Tensor:
        """[N, H, D] -> [R, S, H, D]"""
        return packed.index_select(0, self.tokens).unflatten(0, (len(self.rows), -1))

    def in_rows_of(self, arena: Tensor) -> Tensor:
        """[.., H, D] of the arena, where the tokens have been stored -> [R, S, H, D]"""
        return arena.index_select(0, self.kept).unflatten(0, (len(self.rows), -1))

    def end_to_end(self, rows: Tensor) -> Tensor:
        """[R, S, H, D] -> [N, H, D]"""
        return rows.flatten(0, 1).index_select(0, self.queries)


@dataclass(frozen=True)
class Suffix:
    """A forward of a few tokens per row, stored in the suffixes at `where`: [S], or a slice."""

    where: slice | Tensor
    at: Tensor  # [S] the same
    query_len: Tensor  # [R]
    suffix_len: Tensor  # [R]


@dataclass
class Place:
    """The bookkeeping on one device: the cache's own, or a copy on another device of a model that has several."""

    device: torch.device
    offsets: Tensor  # [P]
    lengths: Tensor  # [P]
    slot: Tensor  # [R]
    plan: Packed | Suffix | None = None


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
    rotates: bool = False


class Group:
    """The storage of all planes (a layer's keys, or its values) of one shape, dtype and device, two by two."""

    def __init__(self, plane: Plane, planes: int, tokens: int, segment_size: int, buffers: Buffers) -> None:
        self.buffers, self._plane, self._pairs, self._segment_size = buffers, plane, -(-planes // 2), segment_size
        heads, size, dtype, self.device = plane
        self.arena = buffers.take(("arena", plane), (self._pairs, 2, tokens, heads, size), dtype, self.device)
        self.suffix = self.arena.new_empty(self._pairs, 2, 0, segment_size, heads, size)
        self.arena_planes = self.arena.flatten(0, 1).unbind()

    def make_room(self, rows: int) -> None:
        """For as many rows; what the rows held before may be lost."""
        if rows > self.suffix.shape[2]:
            heads, size, dtype, device = self._plane
            self.suffix = self.suffix[:, :, :0].clone()  # first, so that there is room for the new one
            shape = (self._pairs, 2, rows, self._segment_size, heads, size)
            self.suffix = self.buffers.take(("suffix", self._plane), shape, dtype, device)

    def keep(self, rows: Sequence[int], tokens: int) -> None:
        """Move the first `tokens` of these rows' suffixes, in rising order, to the front; the others are lost."""
        for place, row in enumerate(rows):
            if place != row:
                self.suffix[:, :, place, :tokens].copy_(self.suffix[:, :, row, :tokens])

    def copy(self, source: int, place: int, tokens: int) -> None:
        """Copy as many tokens of the arena; the two stretches may overlap."""
        for pair in self.arena:  # one after the other, so that there is a second copy of one alone
            pair[:, place : place + tokens] = pair[:, source : source + tokens].clone()

    def release(self) -> None:
        self.suffix = self.suffix[:, :, :0].clone()
        self.buffers.drop(("suffix", self._plane))

    def close(self) -> None:
        self.arena = self.suffix = self.arena.new_empty(0)
        self.arena_planes = ()

    def suffix_planes(self, rows: slice) -> tuple[Tensor, ...]:
        """[R, T, Hkv, D] of each plane."""
        return self.suffix.flatten(0, 1)[:, rows].unbind()
