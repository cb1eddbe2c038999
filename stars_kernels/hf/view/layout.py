"""What a model keeps of its past, found by one forward of one token: no config is read for shapes.

`layout_of(view)` tells each attention layer's keys and values, the order in which the layers ask, which of them read
another layer's keys, and whether the model has conv or recurrent states of its own.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin

from stars_kernels.hf.families import STEPS, WORKS
from stars_kernels.hf.modes import without_autocast
from stars_kernels.hf.view.attention import Mask, Rotate, Rotation, UnsupportedModel, answered_by, check_options
from stars_kernels.versions import CACHE_ARGUMENTS

Plane = tuple[int, int, torch.dtype, torch.device]
"""Heads, head size, dtype and device of one layer's keys, or of its values."""
Mode = Literal["hook", "gathered"]


@dataclass(frozen=True)
class Layer:
    """One attention call of a forward."""

    key: Plane
    value: Plane
    softcap: float = 0.0
    sinks: Tensor | None = None  # [Hq]
    rotates: bool = False
    """Whether its queries and keys are what Llama's apply_rotary_pos_emb returned, and nothing else."""
    source: int | None = None
    """The earlier call whose keys and values this one reads; None = its own."""


@dataclass(frozen=True)
class Layout:
    """mode: "hook" where attention calls reach the cache, "gathered" where the class has no hook."""

    mode: Mode
    layers: list[Layer]
    states: bool
    """Whether some layers have conv or recurrent states."""
    positions: bool
    """Whether the forward takes position_ids (models with ALiBi need none)."""
    argument: str
    """What the forward calls its cache."""
    steps: bool
    """Whether a forward behind a state may read one token only (`hf.families.STEPS`)."""
    makes_mask: bool
    """Whether the model makes a padding mask of its own, whose every use is a look whether it hides anything."""
    limit: int
    """Tokens the model's positions are made for."""
    keeps_logits: bool
    """Whether the forward computes the logits of chosen tokens alone; **kwargs may swallow the wish."""

    @property
    def why_eager(self) -> str | None:
        """Why a segment of this model cannot be a CUDA graph; None where it can."""
        if self.mode == "gathered":
            return "the model has no attention hook"
        if self.makes_mask:
            return "the model makes a padding mask of its own"
        if self.states:
            return "the model has states of its own"
        if len({layer.key[3] for layer in self.layers}) > 1:
            return "the model lies on several devices"
        return None


def layout_of(view: PreTrainedModel) -> Layout:
    """Return the layout of a view, which is found at the first call."""
    found: Layout | None = getattr(view, "_stars_layout", None)
    if found is None:
        found = _probe(view)
        view._stars_layout = found  # type: ignore[assignment]
    return found


@torch.no_grad()
@without_autocast()
def _probe(view: PreTrainedModel) -> Layout:
    probe, argument = _Probe(view), cache_argument(view)
    one = torch.zeros(1, 1, dtype=torch.int64, device=view.device)
    positions = {"position_ids": one} if takes(view, "position_ids") else {}
    try:
        with answered_by(probe):
            view(input_ids=one, use_cache=True, **{argument: probe}, **positions)
        return Layout(
            mode="hook" if has_hook(view) else "gathered",
            layers=probe.attention_layers(has_hook(view)),
            states=any(_has_states(layer) for layer in probe.layers),
            positions=bool(positions),
            argument=argument,
            steps=WORKS.get(type(view).__name__) == STEPS,
            makes_mask=probe.makes_mask,
            limit=context_limit(view),
            keeps_logits="logits_to_keep" in inspect.signature(type(view).forward).parameters,
        )
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{type(view).__name__} cannot be decoded exactly: {error}") from None


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the configuration of a model's language model, where the model has other parts too."""
    config: PreTrainedConfig = model.config.get_text_config(decoder=True)
    return config


def vocabulary(model: PreTrainedModel) -> int:
    """Return how many token ids it reads: as its config says, but no more than its embeddings have rows (a cut weight).

    Embeddings may have more rows than the vocabulary, for images or for padding.
    """
    return min(text_config(model).vocab_size, len(cast(Tensor, model.get_input_embeddings().weight)))


def context_limit(model: PreTrainedModel) -> int:
    """Return how many tokens a model's positions are made for; sys.maxsize where it names no limit."""
    names = ("max_position_embeddings", "max_target_positions", "max_seq_len")
    return next((int(limit) for name in names if (limit := getattr(text_config(model), name, None))), sys.maxsize)


def cache_argument(model: nn.Module) -> str:
    """Return the name of the forward's argument for a cache; past_key_values where only **kwargs could take it."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), "past_key_values")


def has_hook(view: PreTrainedModel) -> bool:
    """Say whether the class goes through transformers' attention interface."""
    return bool(type(view)._can_set_attn_implementation())


def takes(model: nn.Module, argument: str) -> bool:
    """Say whether the model's forward has a parameter of that name, or takes any."""
    parameters = inspect.signature(model.forward).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _has_states(layer: Any) -> bool:
    return isinstance(layer, LinearAttentionCacheLayerMixin) and any(
        (*layer.is_conv_states_initialized.values(), *layer.is_recurrent_states_initialized.values())
    )


def _plane(tensor: Tensor) -> Plane:
    """tensor: [B, H, S, D]."""
    return tensor.shape[1], tensor.shape[3], tensor.dtype, tensor.device


class _Probe(Cache):
    """Notes what a forward of one token asks of its cache; the token sees itself alone."""

    def __init__(self, view: PreTrainedModel) -> None:
        self.layers = DynamicCache(config=view.config).layers
        self.updates: list[Layer] = []
        self.calls: list[Layer] = []
        self.makes_mask = False
        self._answered: set[int] = set()  # how many updates there had been at each call
        self._stored: list[tuple[Tensor, Tensor]] = []  # of each call, kept alive so that none is another's by chance
        self._turned: tuple[Tensor, Tensor] | None = None  # what the layer that is being asked has turned

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.updates.append(Layer(_plane(key_states), _plane(value_states)))
        return key_states, value_states

    def turn(self, rotation: Rotation, rotate: Rotate) -> tuple[Tensor, Tensor]:
        turned = rotate(*rotation)
        whole = rotation.cos.dim() == 3 and rotation.cos.shape[-1] == rotation.query.shape[-1] == rotation.key.shape[-1]
        self._turned = turned if whole and len({tensor.dtype for tensor in rotation}) == 1 else None
        return turned

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, options: dict[str, Any]
    ) -> Tensor:
        rotates = self._turned is not None and query is self._turned[0] and key is self._turned[1]
        rotates, self._turned = rotates and value.dtype == key.dtype, None
        self.calls = [  # what was turned is wanted once more: so it has to be turned before the first call
            replace(call, rotates=call.rotates and known is not key)
            for call, (known, _) in zip(self.calls, self._stored, strict=True)
        ]
        check_options(mask, options)
        source = next((i for i, (k, v) in enumerate(self._stored) if k is key and v is value), None)
        if len(self.updates) in self._answered and not any(key is k for k, _ in self._stored):
            raise UnsupportedModel("it attends to keys that it did not tell its cache of")
        self._answered.add(len(self.updates))
        softcap, sinks = options.get("softcap") or 0.0, options.get("s_aux")
        self.calls.append(Layer(_plane(key), _plane(value), float(softcap), sinks, rotates, source))
        self._stored.append((key, value))
        if sinks is not None and sinks.shape != (query.shape[1],):
            raise UnsupportedModel(f"its attention sinks have shape {list(sinks.shape)}, expected [{query.shape[1]}]")
        group = query.shape[1] // value.shape[1]
        return value.repeat_interleave(group, dim=1).transpose(1, 2)  # the softmax of one score, but for sinks

    def attention_layers(self, hook: bool) -> list[Layer]:
        """Return the attention layers that the forward showed, in the order in which it called them."""
        answered, updates = len(self._answered), len(self.updates)
        if hook and answered != updates:
            raise UnsupportedModel(
                f"{answered} of {updates} layers called the stars attention hook, so it does not go through "
                "transformers' attention interface"
            )
        if not updates and not any(_has_states(layer) for layer in self.layers):
            raise UnsupportedModel("it keeps nothing in its cache")
        return self.calls if hook else self.updates

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0
