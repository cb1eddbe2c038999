"""transformers' attention hook: one function for attention, one for masks, both registered as "stars".

Each layer's call goes to the cache of the forward that runs in this thread. A mask is not a tensor here but its
pattern's name (`Mask`), which transformers hands unchanged from the mask function to the attention function. What the
cache has no name for (a mask of another pattern, an argument that would change the result) is refused, never ignored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

ATTENTION = "stars"
"""The name of our attention in transformers' registry."""
HARMLESS = {
    "dropout", "sliding_window", "softcap", "s_aux", "is_causal", "position_ids", "cache_position", "use_cache",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep",
}  # fmt: skip
"""Arguments of an attention call that are read here, or that change nothing in a forward without gradients."""


class UnsupportedModel(ValueError):
    """A model that cannot be decoded exactly from a fork cache; the message says why."""


@dataclass(frozen=True)
class Mask:
    """The pattern of a causal mask: all keys, or those less than `window` tokens back."""

    window: int = 0

    def __getitem__(self, part: tuple[slice, ...]) -> Mask:
        """Gemma 4 cuts its masks [B, 1, S, T] to the queries that it keeps, which are all of them here."""
        if any(index not in (slice(None), slice(0, None)) for index in part):
            raise UnsupportedModel(f"it cuts its mask to {part}")
        return self


FULL = Mask()


class Rotation(NamedTuple):
    """A layer's queries and keys [B, H, S, D] before they are turned by their positions' cos and sin [B or 1, S, D]."""

    query: Tensor
    key: Tensor
    cos: Tensor
    sin: Tensor


Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A `Rotation`, taken apart -> the turned queries and keys."""


class Attend(Protocol):
    """What answers a layer's attention call; see `_stars_attention`."""

    makes_mask: bool

    def turn(self, rotation: Rotation, rotate: Rotate) -> tuple[Tensor, Tensor]:
        """Return a layer's queries and keys, turned by `rotate`; or as they are, for the next call to turn them."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, options: dict[str, Any]
    ) -> Tensor: ...


_current = threading.local()


@contextmanager
def answered_by(cache: Attend) -> Iterator[None]:
    """Within this block, attention calls in this thread go to `cache`."""
    _current.cache = cache
    try:
        yield
    finally:
        _current.cache = None


def current_cache() -> Attend | None:
    """Return what answers the attention calls of this thread, if anything does."""
    cache: Attend | None = getattr(_current, "cache", None)
    return cache


def _stars_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Answer a layer's attention call for the new tokens: query [B, Hq, S, Dk], key, value -> [B, S, Hq, Dv]."""
    cache = current_cache()
    if cache is None:
        raise RuntimeError('attn_implementation "stars" needs a ForkCache as its cache')
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return cache.attend(query, key, value, attention_mask, scale, options), None


def _stars_mask(
    mask_function: Callable[..., Any], local_size: int | None = None, attention_mask: Any = None, **_: Any
) -> Mask:
    """Return the pattern in place of a mask: what is visible follows from the cache's own lengths."""
    if attention_mask is not None:  # the engine gives none: some models make one of ones
        _current.cache.makes_mask = True
        if not bool(attention_mask.all()):
            raise UnsupportedModel("it makes a mask of its own that hides some tokens")
    return pattern_of(mask_function, local_size)


def pattern_of(mask_function: Callable[..., Any], local_size: int | None = None) -> Mask:
    """Return the pattern of one of transformers' mask functions; refuse any other by its name.

    transformers makes a new closure at each call, so a sliding window is known by its code and what that closes over.
    """
    if mask_function is causal_mask_function:
        return FULL
    if local_size is not None and _code_of(mask_function) == _code_of(sliding_window_causal_mask_function(local_size)):
        return Mask(local_size)
    raise UnsupportedModel(f"its attention mask is a {describe(mask_function)}, expected a causal mask or a window")


def _code_of(function: Any) -> Any:
    """Return what a closure does: its code, and the same of what it closes over."""
    if isinstance(function, tuple):
        return tuple(map(_code_of, function))
    if not hasattr(function, "__code__"):
        return function
    return function.__code__, tuple(_code_of(cell.cell_contents) for cell in function.__closure__ or ())


def describe(mask_function: Callable[..., Any]) -> str:
    """Name the functions that a mask function is made of."""
    parts = [mask_function]
    for cell in getattr(mask_function, "__closure__", None) or ():
        parts += cell.cell_contents if isinstance(cell.cell_contents, tuple) else [cell.cell_contents]
    names = [getattr(part, "__qualname__", "").partition(".<locals>")[0] for part in parts]
    return " of ".join(filter(None, [names[0], " and ".join(filter(None, names[1:]))])) or repr(mask_function)


def check_options(mask: Any, options: dict[str, Any]) -> None:
    """Refuse an attention call whose result depends on something that the fork cache does not know of."""
    if not isinstance(mask, Mask):
        raise UnsupportedModel(f"its attention gets a mask of type {type(mask).__name__}, made without the mask hook")
    window = options.get("sliding_window") or 0
    if window not in (0, mask.window):
        raise UnsupportedModel(f"its attention gets sliding_window={window} with a mask of window {mask.window}")
    if options.get("is_causal") is False:
        raise UnsupportedModel("its attention is bidirectional")
    unknown = [name for name, value in options.items() if name not in HARMLESS and value is not None]
    if unknown:
        raise UnsupportedModel(f"its attention gets {', '.join(sorted(unknown))}, which the fork cache does not know")


AttentionInterface.register(ATTENTION, _stars_attention)
AttentionMaskInterface.register(ATTENTION, _stars_mask)
