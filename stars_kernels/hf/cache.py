"""ForkCache: one stored prefix per prompt, one short suffix per row, read through transformers' attention hook.

    arena   [L, 2, N, Hkv, D]    prompt p owns slots from offset_p on, the first length_p of them are its prefix
    suffix  [L, 2, R, T, Hkv, D] a row's own tokens since the prefix

`fork` opens rows on their prompts' prefixes, `rollback` shortens what the rows hold, `commit` moves chosen suffixes
behind the prefixes. The model is never patched: attention reaches this cache because `update()` of a layer runs just
before that layer's attention, in the same thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from stars_kernels import ops
from stars_kernels.ops._registry import call_op

ATTENTION = "stars"
"""The name of our attention in transformers' registry."""

_current = threading.local()


@dataclass(frozen=True)
class _Span:
    """A part of a packed forward: the next tokens of one prompt, and where they go."""

    tokens: slice
    slots: slice
    prompt: Tensor  # [1]
    count: Tensor  # [1]


@dataclass(frozen=True)
class _Suffix:
    """A forward of a few tokens a row, stored in the suffixes' `slots`."""

    slots: slice
    query_len: Tensor  # [R]
    suffix_len: Tensor  # [R]


class ForkCache(Cache):
    """Storage and attention of one model for a batch of prompts."""

    def __init__(
        self, config: PreTrainedConfig, capacities: Sequence[int], segment_size: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        """capacities: tokens each prompt may hold, answer included."""
        heads = config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.num_layers = config.num_hidden_layers
        self.segment_size = segment_size
        self.arena = torch.empty(self.num_layers, 2, sum(capacities), heads, size, dtype=dtype, device=device)
        self._arena_layers = [layer.unbind() for layer in self.arena.unbind()]
        self.suffix = self.arena.new_empty(self.num_layers, 2, 0, segment_size, heads, size)
        self._suffix_layers: list[tuple[Tensor, ...]] = []  # keys and values of the open rows
        sizes = torch.tensor([0, *capacities], dtype=torch.int64, device=device)
        self.offsets = sizes.cumsum(0)[:-1]  # [P]
        self.lengths = torch.zeros_like(self.offsets)  # [P]
        self.prompt = self.lengths[:0]  # [R] the prompt of each open row
        self.held = 0  # suffix tokens every open row holds
        self._plan: list[_Span] | _Suffix | None = None
        self._layers_seen = 0

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV this cache takes: the prompts' arena slots, and rows * segment_size of suffix."""
        return self.arena.shape[2] + self.suffix.shape[2] * self.suffix.shape[3]

    @property
    def kv_bytes(self) -> int:
        return (self.arena.numel() + self.suffix.numel()) * self.arena.element_size()

    def fork(self, prompt: Tensor) -> None:
        """Open one row for each entry of `prompt` [R] on that prompt's prefix; nothing is copied."""
        rows = prompt.shape[0]
        if rows > self.suffix.shape[2]:
            shape = list(self.suffix.shape)
            shape[2] = rows
            self.suffix = self.suffix.new_empty(shape)
        self._suffix_layers = [layer.unbind() for layer in self.suffix[:, :, :rows].unbind()]
        self.prompt, self.held = prompt, 0

    def rollback(self, held: int = 0) -> None:
        """Forget all but the first `held` suffix tokens of every row; no byte moves."""
        if not 0 <= held <= self.held:
            raise ValueError(f"rollback to {held} suffix tokens, expected 0 to {self.held}")
        self.held = held

    def release(self) -> None:
        """Give back the memory of the suffixes; the next fork takes what it needs."""
        self.suffix, self._suffix_layers = self.suffix[:, :, :0].clone(), []

    def commit(self, prompt: Tensor, row: Tensor, count: Tensor, advance: Tensor) -> None:
        """Write `count` suffix tokens of `row` behind the prefix of `prompt` (see `ops.kv_commit`); forget the rest."""
        ops.kv_commit(self.suffix, self.arena, self.lengths, self.offsets, prompt, row, count, advance)
        self.rollback()

    @contextmanager
    def prefill(self, prompts: list[int], counts: list[int]) -> Iterator[dict[str, Any]]:
        """Forward [1, sum(counts)] packed tokens, the next counts[i] of prompts[i]; yields the forward's arguments."""
        device, starts, offsets = self.lengths.device, self.lengths.tolist(), self.offsets.tolist()
        spans, positions, end = [], [], 0
        for p, count in zip(prompts, counts, strict=True):
            slot, begin, end = offsets[p] + starts[p], end, end + count
            one, length = torch.tensor([p], device=device), torch.tensor([count], device=device)
            spans.append(_Span(slice(begin, end), slice(slot, slot + count), one, length))
            positions.append(torch.arange(starts[p], starts[p] + count, device=device))
        with self._forward(spans):
            yield self._arguments(torch.cat(positions)[None])
        self.lengths[prompts] += torch.tensor(counts, device=device)

    @contextmanager
    def extend(self, steps: int, query_len: Tensor | None = None) -> Iterator[dict[str, Any]]:
        """Forward [R, steps] more suffix tokens of the open rows, query_len [R] of them real; yields its arguments."""
        start = self.held
        if start + steps > self.segment_size:
            raise ValueError(f"{start} + {steps} suffix tokens, expected at most segment_size = {self.segment_size}")
        if query_len is None:
            query_len = torch.full_like(self.prompt, steps)
        positions = self.lengths[self.prompt][:, None] + torch.arange(start, start + steps, device=self.prompt.device)
        with self._forward(_Suffix(slice(start, start + steps), query_len, query_len + start)):
            yield self._arguments(positions)
        self.held = start + steps

    def _arguments(self, positions: Tensor) -> dict[str, Any]:
        """What the model's forward takes beside its input_ids."""
        return {"position_ids": positions, "past_key_values": self, "use_cache": True}

    @contextmanager
    def _forward(self, plan: list[_Span] | _Suffix) -> Iterator[None]:
        self._plan, self._layers_seen = plan, 0
        try:
            yield
        finally:
            self._plan = None
            _current.cache = None
        if self._layers_seen != self.num_layers:
            raise RuntimeError(
                f"{self._layers_seen} of {self.num_layers} layers called the stars attention hook: this model does not "
                "go through transformers' attention interface, so its result would be wrong"
            )

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """transformers calls this in each layer; `attend` does the storing, with the layer's own queries at hand."""
        _current.cache = self
        return key_states, value_states

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [B, Hq, S, D], key and value [B, Hkv, S, D] of the new tokens, which are stored -> [B, S, Hq, D]."""
        self._layers_seen += 1
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        arena_keys, arena_values = self._arena_layers[layer]
        plan = self._plan
        if isinstance(plan, _Suffix):
            keys, values = self._suffix_layers[layer]  # [R, T, Hkv, D]
            keys[:, plan.slots], values[:, plan.slots] = key, value
            return call_op(  # its arguments are right by construction, and this runs thousands of times a second
                "fork_attention", query, keys, values, plan.suffix_len, plan.query_len, arena_keys, arena_values,
                self.offsets, self.lengths, self.prompt, scale, 0, 0.0, None,
            )  # fmt: skip
        if plan is None:
            raise RuntimeError("the stars attention ran outside ForkCache.prefill or ForkCache.extend")
        out = torch.empty_like(query)  # [1, N, Hq, D]
        for span in plan:
            new = span.tokens
            out[:, new] = ops.fork_attention(
                query[:, new], key[:, new], value[:, new], span.count, span.count, arena_keys, arena_values,
                self.offsets, self.lengths, span.prompt, scale=scale,
            )  # fmt: skip
            arena_keys[span.slots], arena_values[span.slots] = key[0, new], value[0, new]
        return out

    # What transformers asks of a cache; the mask is ours, so the sizes do not matter.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.held

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.held

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self.num_layers

    is_linear = is_dummy = is_sliding


def open_cache(model: PreTrainedModel, capacities: Sequence[int], segment_size: int) -> ForkCache:
    """An empty cache for prompts of up to `capacities` tokens each; `model` is a view (`hf.models.view_of`)."""
    return ForkCache(model.config, capacities, segment_size, model.dtype, model.device)


def _stars_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    cache = getattr(_current, "cache", None)
    if cache is None:
        raise RuntimeError('attn_implementation "stars" needs a ForkCache as past_key_values')
    return cache.attend(module.layer_idx, query, key, value, scaling), None


def _stars_mask(**kwargs: Any) -> None:
    """No mask: causality follows from the cache's own lengths."""


AttentionInterface.register(ATTENTION, _stars_attention)
AttentionMaskInterface.register(ATTENTION, _stars_mask)
