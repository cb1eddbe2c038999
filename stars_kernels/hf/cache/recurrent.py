"""The conv and recurrent states of hybrid models, which have no token to point at: copied for each row.

A slot has one state per layer, after its prefix, and one after its best candidate so far. Rows start from copies of
the first. A state cannot be cut back to an earlier token: rows go back to their prefix or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

from stars_kernels.decoder.protocols import Settle


class States:
    """The states of `slots` slots, and those of the rows of the running forward."""

    def __init__(self, config: PreTrainedConfig, slots: int) -> None:
        self.layers: list[Any] = DynamicCache(config=config).layers
        """transformers' own; those with states hold the rows'."""
        self.slots = slots
        self.prefix: dict[Any, Tensor] = {}  # [P, ...] of each state, after the prefix
        self.best: dict[Any, Tensor] = {}  # [P, ...] after the candidate that lies behind the prefix
        self.rows: dict[Any, Tensor] = {}  # [R, ...] of the forked rows
        self.ready = False
        """Whether the rows continue their slots' prefixes."""

    def start(self, slot: int, length: int) -> None:
        """Clear the states before the forward that reads a slot's prompt, all of it at once."""
        if length:
            raise ValueError(f"slot {slot} has {length} tokens already, expected 0: states need it in one forward")
        for layer, held, ready, index in self._states():
            held[index], ready[index] = None, False
            layer.has_previous_state[index] = False

    def keep(self, slot: int) -> None:
        """Keep what that forward left as the state after the slot's prefix."""
        for layer, held, _, index in self._states():
            key, state = (id(layer), held is layer.conv_states, index), held[index]
            if state is None:
                continue
            if key not in self.prefix:
                shape = (self.slots, *state.shape[1:])
                self.prefix[key], self.best[key] = (state.new_full(shape, torch.nan) for _ in range(2))
            self.prefix[key][slot] = state[0]

    def fork(self, slot: Tensor) -> None:
        """Make room for a state of each row; slot: [R], the slot of each."""
        self.slot = slot
        self.rows = {key: stored.new_empty(len(slot), *stored.shape[1:]) for key, stored in self.prefix.items()}

    def open(self, rows: slice) -> None:
        """Give each of these rows its slot's state; the layers then work on these alone, in place."""
        self.ready = True
        for layer, held, ready, index in self._states():
            key = (id(layer), held is layer.conv_states, index)
            if key in self.rows:
                stored = self.prefix[key]
                self.rows[key][rows] = stored[self.slot[rows].to(stored.device)]
                held[index], ready[index] = self.rows[key][rows], True
                layer.has_previous_state[index] = True

    def commit(self, slot: Tensor, row: Tensor, count: Tensor, advance: Tensor, held: int) -> Settle:
        """Keep the rows' states for their slots; it shows once the result is called.

        A state is that after all `held` tokens. A candidate with fewer was ended by EOS, a stop string or the limit:
        if it is chosen its answer is finished and its state never read. NaN makes sure of that: read, it would show.
        """
        kept_best, kept_prefix = {}, {}
        for key, state in self.rows.items():
            p, r, n, go = (t.to(state.device) for t in (slot, row, count, advance))
            one = (-1, *[1] * (state.dim() - 1))
            new = state[r.clamp(min=0)].masked_fill((n != held).view(one), torch.nan)
            best = torch.where((r >= 0).view(one), new, self.best[key][p])
            prefix = torch.where(go.view(one), best, self.prefix[key][p])
            kept_best[key] = self.best[key].index_copy(0, p, best)
            kept_prefix[key] = self.prefix[key].index_copy(0, p, prefix)

        def settle() -> None:
            self.best.update(kept_best)
            self.prefix.update(kept_prefix)
            self.ready = False

        return settle

    def _states(self) -> Iterator[tuple[Any, dict[int, Tensor | None], dict[int, bool], int]]:
        """Yield each layer that may have a state, where it holds it, where it says so, and its index there."""
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                for index in range(layer.number_of_states):
                    yield layer, layer.conv_states, layer.is_conv_states_initialized, index
                    yield layer, layer.recurrent_states, layer.is_recurrent_states_initialized, index
