"""What a model keeps of its past: one stored prefix per slot, and per row what it has read since."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from stars_kernels.hf.cache.buffers import Buffers
from stars_kernels.hf.cache.fork import ForkCache
from stars_kernels.hf.cache.gathered import GatheredCache
from stars_kernels.hf.cache.recurrent import States
from stars_kernels.hf.view.layout import layout_of


def open_cache(
    model: PreTrainedModel, capacities: Sequence[int], segment_size: int, buffers: Buffers | None = None
) -> ForkCache:
    """Open an empty cache of a view for one slot per entry of `capacities`, of up to as many tokens.

    buffers: where it takes its memory from, and leaves it; None = memory of its own.
    """
    layout = layout_of(model)
    kind = ForkCache if layout.mode == "hook" else GatheredCache
    states = States(model.config, len(capacities)) if layout.states else None
    device = layout.layers[0].key[3] if layout.layers else model.device
    return kind(layout, capacities, segment_size, device, states, buffers)


def close_cache_of(owner: object) -> None:
    """Free the `cache` of an object, where it has one, and whatever else it holds."""
    cache = vars(owner).get("cache")
    if cache is not None:
        cache.close()
    vars(owner).clear()
