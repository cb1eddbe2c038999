"""GatheredCache: for models whose attention does not go through transformers' hook."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stars_kernels.hf.cache.fork import ForkCache
from stars_kernels.hf.cache.storage import Packed, Suffix


class GatheredCache(ForkCache):
    """The cache of models without the attention hook, which get copies of whole rows.

    `update()` stores a layer's new keys and values and returns those of every row's prefix and suffix, padded on the
    left; the model's own attention does the rest, with a 2-D mask. It is exact, and gives up what forking saves: each
    layer copies each row's prefix.
    """

    @contextmanager
    def _forward(self, plan: Packed | Suffix) -> Iterator[None]:
        """First find the places [R, T] in the arena that each row's keys come from, and which of them are real."""
        if isinstance(plan, Suffix):
            assert isinstance(plan.where, slice)  # no tensor: these models have no CUDA graphs
            lengths, offsets = self.lengths[self.slot], self.offsets[self.slot]
            self._past, new = int(lengths.max()) + plan.where.start, plan.where.stop - plan.where.start
            prefix = self._past - plan.where.start
        else:
            lengths, offsets = plan.lengths[:1], plan.offsets[:1]  # of one prompt's first row
            prefix = self._past = int(lengths)
            new = len(plan.where)
        # Of what is longer than the context, the beginning goes: padding, or what a row past its end would read.
        beyond = max(0, self._past + new - self.layout.limit)
        self._past -= beyond
        place = torch.arange(beyond, prefix, device=self.device) - prefix + lengths[:, None]  # [R, T] negative: padding
        self._where = offsets[:, None] + place.clamp(min=0)  # padding reads a finite key, which the mask hides
        self._mask = torch.nn.functional.pad((place >= 0).long(), (0, self._past + new - place.shape[1]), value=1)
        with super()._forward(plan):
            yield

    def _strides(self, steps: int) -> list[int]:
        """All at once up to where the longest row's context ends; beyond it, singly.

        A forward's keys are one block, of no more columns than the context has, so each column beyond takes the first
        one from every row. Of tokens read singly that is padding, or what a row past its own end would read.
        """
        room = self.layout.limit - int(self.lengths[self.slot].max()) - self.held
        together = max(1, min(steps, room))
        return [together] + [1] * (steps - together)

    def _arguments(self, positions: Tensor) -> dict[str, Any]:
        return super()._arguments(positions) | {"attention_mask": self._mask}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store keys and values [B, Hkv, S, D] of the new tokens; return those of all, [B, Hkv, T + S, D]."""
        layer = self._layers[self._asked]
        self._asked += 1
        plan, where = layer.place.plan, self._where.to(layer.place.device)
        new = key_states.transpose(1, 2), value_states.transpose(1, 2)  # [B, S, Hkv, D]
        arenas, suffixes = (layer.arena_keys, layer.arena_values), (layer.keys, layer.values)
        if isinstance(plan, Suffix):
            assert isinstance(plan.where, slice)
            for suffix, tokens in zip(suffixes, new, strict=True):
                suffix[:, plan.where] = tokens
            new = layer.keys[:, : plan.where.stop], layer.values[:, : plan.where.stop]
        elif plan is not None:
            for arena, tokens in zip(arenas, new, strict=True):
                arena[plan.where] = tokens[0]
        gathered = (torch.cat([a[where], tokens], dim=1) for a, tokens in zip(arenas, new, strict=True))
        return tuple(tensor.transpose(1, 2).contiguous() for tensor in gathered)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._past

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._past + query_length, 0
