"""A decoder that reads rows of its own token ids, each token once for as long as re-tokenisation leaves it there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stars_kernels.decoder.prefixes import shared_length
from stars_kernels.decoder.protocols import Room, Settle
from stars_kernels.hf.cache import ForkCache, open_cache
from stars_kernels.hf.cache.buffers import Buffers
from stars_kernels.hf.cache.prefill import packed_chunks
from stars_kernels.hf.loading.language_model import name_of
from stars_kernels.hf.scoring.chunks import Chunks
from stars_kernels.hf.view.layout import layout_of

SPARE_TOKENS = 32
"""More than twice what the language model writes, of the reader's tokens: room for templates and for finer tokens."""


Values = Callable[[Tensor], Tensor]
"""What is kept of every token: hidden [..., D] -> one value each [...], or several [..., K]."""


class RowReader:
    """A value for each token of each row; what the arena holds in each slot is known here, as token ids."""

    def __init__(self, backbone: PreTrainedModel, values: Values, chunks: Chunks, buffers: Buffers) -> None:
        """backbone: a view with the stars attention.

        buffers: where the cache takes its memory from, and leaves it.
        """
        if layout_of(backbone).states:
            raise ValueError(
                f"reward_model {name_of(backbone)} has states, which cannot be cut back to where a longer text "
                "tokenises "
                "otherwise; expected a model of attention alone, or one that reads the language model's token ids"
            )
        self.backbone, self.head, self.chunks, self.buffers = backbone, values, chunks, buffers
        self.device = backbone.device
        self.cache: ForkCache | None = None

    def reserve(self, room: Room) -> None:
        """Be ready for so many slots; memory is taken once their rows are known, whose lengths tell how much."""
        self.close()
        self.slots_in_all = room.slots
        self.room = 2 * room.answer + SPARE_TOKENS  # of a slot, behind the longest rows so far
        self.steps = 2 * room.segment + SPARE_TOKENS  # of a row's suffix
        self.capacity = 0  # of a slot

    def admit(self, slots: Sequence[int]) -> None:
        """Forget what was read in these slots."""
        if self.cache is not None:
            for p in slots:
                self.held[p], self.held_values[p] = [], []

    def open(self, slots: Sequence[int], rows: list[list[int]]) -> None:
        """Take rows of token ids; slots: the slot of each, rows of one slot side by side.

        What all rows of a slot share is kept in its prefix, or read into it once; of a row, its last token at least is
        read behind it.
        """
        shared: dict[int, list[int]] = {}
        for p in dict.fromkeys(slots):
            mine = [row[:-1] for slot, row in zip(slots, rows, strict=True) if slot == p]
            first, last = min(mine), max(mine)  # what these two share, all do
            shared[p] = first[: shared_length(first, last)]
        self.slots, self.rows = slots, rows
        self.news = [row[len(shared[p]) :] for p, row in zip(slots, rows, strict=True)]
        self.values: dict[int, list[float]] = {}
        if not rows:
            return
        cache = self._fitting(rows, max(map(len, self.news)))
        self.uncounted = self._read_shared(cache, shared)
        """Of each slot, tokens that were read for all of its rows; they are counted with the first."""
        cache.fork(self._tensor(slots))

    def read(self, numbers: list[int]) -> tuple[list[list[float]], list[int]]:
        """Values of all tokens of these of the rows, and how many tokens were read for each."""
        assert self.cache is not None
        found = self._read_rows(self.cache, numbers)
        counts = [len(self.news[r]) for r in numbers]
        for i, (r, values) in enumerate(zip(numbers, found, strict=True)):
            self.values[r] = self.held_values[self.slots[r]] + values
            counts[i] += self.uncounted.pop(self.slots[r], 0)
        return [self.values[r] for r in numbers], counts

    def keep(self, kept: Sequence[int]) -> Settle:
        """Move these rows, which were read, one of a slot at most, behind their slots' prefixes.

        It shows once the result is called.
        """
        if not kept or self.cache is None:
            return lambda: None
        slot, row, count = (
            self._tensor(column) for column in zip(*((self.slots[r], r, len(self.news[r])) for r in kept), strict=True)
        )
        settle_cache = self.cache.commit(slot, row, count, torch.ones_like(slot, dtype=torch.bool))

        def settle() -> None:
            settle_cache()
            for r in kept:
                self.held[self.slots[r]], self.held_values[self.slots[r]] = self.rows[r], self.values[r]

        return settle

    def release(self) -> None:
        if self.cache is not None:
            self.cache.release()

    def close(self) -> None:
        if self.cache is not None:
            self.cache.close()
        self.cache = None

    def _fitting(self, rows: list[list[int]], steps: int) -> ForkCache:
        """Return the cache, or a new and empty one where its slots or its suffixes are too short for these rows."""
        longest = max(map(len, rows))
        if self.cache is not None and longest <= self.capacity and steps <= self.steps:
            return self.cache
        self.cache = None  # gives its memory back first, and stays away where there is none for the next
        capacity = self.capacity if longest <= self.capacity else longest + self.room
        steps = self.steps if steps <= self.steps else 2 * steps
        count = self.slots_in_all
        self.cache = open_cache(self.backbone, [capacity] * count, steps, self.buffers)
        self.capacity, self.steps = capacity, steps  # the others' rows have room as before, where this one's has none
        self.held: list[list[int]] = [[] for _ in range(count)]
        self.held_values: list[list[float]] = [[] for _ in range(count)]
        return self.cache

    def _read_shared(self, cache: ForkCache, shared: dict[int, list[int]]) -> dict[int, int]:
        """Make each slot's prefix what its rows share; how many tokens that took."""
        slots = list(shared)
        for p, ids in shared.items():
            kept = shared_length(self.held[p], ids)
            self.held[p], self.held_values[p] = self.held[p][:kept], self.held_values[p][:kept]
        cache.cut(self._tensor(slots), self._tensor([len(self.held[p]) for p in slots]))
        pieces = {p: shared[p][len(self.held[p]) :] for p in slots}
        for chunk in packed_chunks(pieces, cache):
            with cache.prefill(chunk.slots, chunk.counts) as inputs:
                hidden = self._hidden(self._tensor([chunk.ids]), inputs)
            values = self.head(hidden)[0].split(chunk.counts)
            for p, new in zip(chunk.slots, values, strict=True):
                start = len(self.held[p])
                self.held[p] = shared[p][: start + len(new)]
                self.held_values[p] = self.held_values[p] + new.tolist()
        return {p: len(piece) for p, piece in pieces.items()}

    def _read_rows(self, cache: ForkCache, numbers: list[int]) -> list[list[float]]:
        news = [self.news[r] for r in numbers]
        counts, lies = [len(new) for new in news], cache.open(numbers)

        def forward(chunk: slice) -> list[list[float]]:
            steps = max(counts[chunk])
            ids = self._tensor([new + [0] * (steps - len(new)) for new in news[chunk]])  # [r, S]
            cache.select(slice(lies + chunk.start, lies + chunk.stop))
            hidden = cache.read(ids, self._tensor(counts[chunk]), self._hidden)
            return [row[:n] for row, n in zip(self.head(hidden).tolist(), counts[chunk], strict=True)]

        return [values for chunk in self.chunks.run(counts, forward) for values in chunk]

    def _hidden(self, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        return self.backbone(input_ids=ids, **inputs).last_hidden_state

    def _tensor(self, ids: Sequence[int] | Sequence[list[int]]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.device)
