"""What a model keeps of its past: one stored prefix per slot, and per row what it has read since."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from transformers import PreTrainedModel

from stars_kernels.decoder.protocols import Admission
from stars_kernels.hf.cache.buffers import Buffers
from stars_kernels.hf.cache.fork import ForkCache
from stars_kernels.hf.cache.gathered import GatheredCache
from stars_kernels.hf.cache.recurrent import States
from stars_kernels.hf.view.layout import layout_of


def reserve_cache(
    model: PreTrainedModel, slots: int, tokens: int, segment_size: int, buffers: Buffers | None = None
) -> ForkCache:
    """Open a cache of a view for so many slots, which are still to be admitted, of so many tokens in all.

    buffers: where it takes its memory from, and leaves it; None = memory of its own.
    """
    layout = layout_of(model)
    kind = ForkCache if layout.mode == "hook" else GatheredCache
    states = States(model.config, slots) if layout.states else None
    device = layout.layers[0].key[3] if layout.layers else model.device
    return kind(layout, slots, tokens, segment_size, device, states, buffers)


def open_cache(
    model: PreTrainedModel, capacities: Sequence[int], segment_size: int, buffers: Buffers | None = None
) -> ForkCache:
    """Open an empty cache of a view for one slot per entry of `capacities`, of up to as many tokens."""
    cache = reserve_cache(model, len(capacities), sum(capacities), segment_size, buffers)
    places = itertools.accumulate(capacities, initial=0)
    cache.admit([Admission(slot, place, ()) for slot, place in zip(range(len(capacities)), places, strict=False)])
    return cache


def close_cache_of(owner: object, names: Sequence[str] = ()) -> None:
    """Free the `cache` of an object, where it has one, and these of its attributes, which come with it."""
    held = vars(owner)
    cache = held.pop("cache", None)
    if cache is not None:
        cache.close()
    for name in names:
        held.pop(name, None)
