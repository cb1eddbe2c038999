"""What an engine would make of a model, found by loading it; or why it is refused."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from stars_kernels.hf.families import REFUSED, WORKS
from stars_kernels.hf.loading.language_model import (
    ModelOrPath,
    check_path,
    eos_ids,
    load_language_model,
    name_of,
    reading,
    unwrapped,
)
from stars_kernels.hf.loading.reward_model import ENCODERS, PROCESS_MODELS, REWARD_MODELS, load_reward_model
from stars_kernels.hf.models import Models
from stars_kernels.hf.proposing.output_layer import why_unfused
from stars_kernels.hf.scoring.reward_model import RewardModel
from stars_kernels.hf.view.copying import eval_copy, view_of
from stars_kernels.hf.view.layout import Layout, context_limit, layout_of, vocabulary
from stars_kernels.hf.view.rewrites import pack, rewritten

HEADS = ("ForSequenceClassification", "ForTokenClassification")
"""How the class names of reward models end."""
PATHS = {
    "hook": "attention through the hook: a prefix is read where it lies, for all attempts at once",
    "states": "through the hook, with conv or recurrent states that are copied for each attempt",
    "steps": "through the hook, one token at a time behind a state: as a language model only",
    "gathered": "without the hook: each layer gets copies of whole rows",
}


@dataclass(frozen=True)
class Check:
    """What an engine would make of a model.

    name: its class, and where it is from. kind: what it is. refused: why it is not taken; None where it is, and then
    facts: what was found, in words, by what it is about. rewrites: how many modules each replacement stands for.
    """

    name: str
    kind: str
    refused: str | None = None
    facts: dict[str, str] = field(default_factory=dict)
    rewrites: dict[str, int] = field(default_factory=dict)


def check_model(model: ModelOrPath, *, trust_remote_code: bool = False) -> Check:
    """Load a language model or a reward model as an engine would, and say which path it gets, or why it is refused.

    It is taken for a reward model where its class is a classifier. The weights of a class that is known to be refused
    are not loaded.

    Raises:
        OSError: there is no such model.
    """
    check_path("model", model)
    kind = _class_of(model, trust_remote_code)
    is_reward = kind in REWARD_MODELS or kind.endswith(HEADS)
    what = _kind_of_reward(kind) if is_reward else "language model"
    try:
        if kind in REFUSED:
            raise ValueError(f"model is a {kind}, {REFUSED[kind]}")
        if is_reward:
            return _reward(load_reward_model(model, None, trust_remote_code).model, what)
        return _language_model(*load_language_model(model, None, trust_remote_code), what)
    except (ValueError, TypeError, ImportError) as error:
        return Check(str(model) if isinstance(model, str | os.PathLike) else kind, what, refused=str(error))


def check_pair(model: ModelOrPath, reward_model: RewardModel | ModelOrPath, *, trust_remote_code: bool = False) -> str:
    """Say how a reward model would read the answers of a language model.

    Raises:
        ValueError: one of them is refused, or they do not go together.
    """
    models = Models(model, reward_model, None, trust_remote_code, pack_as=False)
    if models.rewarder.reads_hidden:
        return "reads the language model's hidden states: no forward of its own"
    if models.rewarder.decoders:
        return "reads the language model's token ids: prefixes are read once, and nothing is tokenised"
    return "reads text: answers are decoded, and tokenised again"


def _class_of(model: ModelOrPath, trust_remote_code: bool) -> str:
    """Return the class's name; of a path, the one that its checkpoint names."""
    if not isinstance(model, str | os.PathLike):
        return type(unwrapped(model, "model")).__name__
    path = os.path.expanduser(model)
    if path.endswith(".gguf"):
        return "a GGUF file's causal language model"
    with reading("model", path):
        named = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).architectures or [""]
    return str(named[0])


def _kind_of_reward(kind: str) -> str:
    if kind in ENCODERS:
        return "reward model, an encoder"
    if kind in PROCESS_MODELS or kind.endswith("ForTokenClassification"):
        return "reward model, a token classifier that scores steps"
    return "reward model, a sequence classifier"


def _language_model(model: PreTrainedModel, tokenizer: object, what: str) -> Check:
    view = view_of(model)
    layout = layout_of(view)  # refuses what cannot be decoded exactly
    template = "none" if tokenizer is None else "yes" if getattr(tokenizer, "chat_template", None) else "no"
    facts = {
        "path": PATHS[WORKS[type(model).__name__]],
        **_shape(model, layout),
        "end tokens": ", ".join(map(str, eos_ids(model))) or "none",
        "chat template": template,
        "output layer and draw": "two ops: " + why if (why := why_unfused(view)) else "one op",
        "CUDA graphs": "none: " + layout.why_eager if layout.why_eager else "on a GPU",
    }
    return _checked(model, view, what, facts)


def _reward(model: PreTrainedModel, what: str) -> Check:
    labels = str(model.config.num_labels)
    if type(model).__name__ in ENCODERS:
        view: nn.Module = eval_copy(model)
        facts = {"path": "an encoder: reads a whole text at a time", **_size(model), "labels": labels}
    else:
        view = view_of(model)
        layout = layout_of(cast(PreTrainedModel, view.base_model))
        facts = {"path": PATHS[layout.mode], **_shape(model, layout), "labels": labels}
    return _checked(model, view, what, facts)


def _checked(model: PreTrainedModel, view: nn.Module, what: str, facts: dict[str, str]) -> Check:
    packed = pack(view)
    if packed:
        facts["packed weights"] = f"{packed / 2**20:.0f} MiB"
    return Check(name_of(model), what, None, facts, dict(Counter(type(m).__name__ for m in rewritten(view))))


def _size(model: PreTrainedModel) -> dict[str, str]:
    count = sum(p.numel() for p in model.parameters())
    limit = context_limit(model)
    return {
        "parameters": f"{count / 1e6:,.1f} million, {str(model.dtype).removeprefix('torch.')}",
        "vocabulary": f"{vocabulary(model):,} tokens",
        "context": f"{limit:,} tokens" if limit < 2**31 else "no limit named",
    }


def _shape(model: PreTrainedModel, layout: Layout) -> dict[str, str]:
    own = [plane for layer in layout.layers if layer.source is None for plane in (layer.key, layer.value)]
    cache = sum(heads * size * torch.empty(0, dtype=dtype).element_size() for heads, size, dtype, _ in own)
    states = ", and states of its own" if layout.states else ""
    return {**_size(model), "kept per token": f"{cache / 1024:.1f} KiB in {len(own) // 2} layers{states}"}
