"""Which models the engine takes, how it loads them, and the view it works on."""

from __future__ import annotations

import copy
import itertools
import os
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from stars_kernels import ops
from stars_kernels.hf.cache import ATTENTION
from stars_kernels.hf.packing import is_plain
from stars_kernels.ops._registry import call_op

LANGUAGE_MODELS = ("LlamaForCausalLM",)
"""Classes whose logits through the fork cache are tested equal to their own."""
REWARD_MODELS = ("LlamaForSequenceClassification",)
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""RoPE variants whose frequencies depend on the longest row of the batch, so batch-mates would change an answer."""

ModelOrPath = PreTrainedModel | str | os.PathLike[str]


@dataclass(frozen=True)
class RewardModel:
    """A reward model and what the engine needs to know of it.

    model: a sequence classifier, its folder or hub name.
    tokenizer: its tokenizer, compared with the language model's. (A model that is loaded here brings its own; without
        one, a model in memory is compared by the size of its vocabulary.)
    label: the output that is the reward, for models with several.
    """

    model: ModelOrPath
    tokenizer: PreTrainedTokenizerBase | None = None
    label: int | None = None

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer)
        if self.label is not None and (isinstance(self.label, bool) or not isinstance(self.label, Integral)):
            raise TypeError(f"label is {self.label!r}, expected an integer or None")


def check_tokenizer(tokenizer: object) -> None:
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer is of type {type(tokenizer).__name__}, expected a transformers tokenizer or None")


def check_path(argument: str, model: object) -> None:
    """Refuse a path that can be no hub's name and does not exist."""
    if not isinstance(model, str | os.PathLike):
        return
    text = os.fspath(model)
    local = isinstance(model, os.PathLike) or text.startswith(("/", "./", "../", "~")) or text.endswith(".gguf")
    if local and not Path(text).expanduser().exists():
        raise FileNotFoundError(
            f"{argument} is {text!r}, which does not exist; expected an existing path or a hub name"
        )


def check_reward_path(rm: object) -> None:
    if isinstance(rm, str | os.PathLike) and os.fspath(rm).endswith(".gguf"):
        raise ValueError(
            f"rm is {os.fspath(rm)!r}, and a .gguf file holds no reward head; "
            "expected a folder, a hub name or a function of texts"
        )
    check_path("rm", rm)


def load_language_model(
    model: ModelOrPath, tokenizer: PreTrainedTokenizerBase | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model itself, or loaded from a path with its tokenizer; refused by name where it is not a tested class."""
    if isinstance(model, str | os.PathLike):
        path, options = _source(model)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
        model = AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=trust_remote_code, dtype="auto", use_safetensors=not options, **options
        )
    _check_model(model, "model", LANGUAGE_MODELS)
    return model, tokenizer


def load_reward_model(
    rm: RewardModel,
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, int]:
    """The reward model, loaded where it is a path, and the index of its reward output; checked against the LM."""
    model, rm_tokenizer, new_head = rm.model, rm.tokenizer, False
    if isinstance(model, str | os.PathLike):
        path = os.path.expanduser(model)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, trust_remote_code=trust_remote_code, dtype="auto", use_safetensors=True, output_loading_info=True
        )
        new_head = any(key.startswith("score") for key in info["missing_keys"])
        if rm_tokenizer is None and _has_tokenizer(path):
            rm_tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    _check_model(model, "rm", REWARD_MODELS)
    name = _name(model)
    head: torch.Tensor = model.get_parameter("score.weight")  # [labels, D]
    loaded = any(getattr(p, "_is_hf_initialized", False) for p in model.parameters())
    if new_head or (loaded and not getattr(head, "_is_hf_initialized", False)):
        raise ValueError(
            f"rm {name}: its head score.weight is not in the checkpoint and was newly initialised, so its rewards are "
            "random; expected a trained reward model (if you trained the head in memory, save and load the model)"
        )
    labels = head.shape[0]
    if rm.label is None and labels != 1:
        raise ValueError(
            f"rm {name} has {labels} labels, expected 1; say which one is the reward with RewardModel(rm, label=...)"
        )
    label = rm.label or 0
    if not 0 <= label < labels:
        raise ValueError(f"label is {label}, but rm {name} has {labels} labels, expected 0 to {labels - 1}")
    _check_same_tokenizer(model, rm_tokenizer, language_model, tokenizer)
    return model, label


def view_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model that shares every tensor with `model` but has its own config and modules: eval mode, our attention.

    The user's model is left alone, so other threads may go on using it.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    view: PreTrainedModel = copy.deepcopy(model, memo={id(t): t for t in tensors})
    view.set_attn_implementation(ATTENTION)
    for parent in list(view.modules()):
        for name, child in list(parent.named_children()):
            if is_plain(child, LlamaRMSNorm) and child.weight.dtype == torch.float32:
                setattr(parent, name, RMSNorm(child))
    return view.eval()


class RMSNorm(nn.Module):
    """LlamaRMSNorm in one op. (In float64 and half precision it rounds otherwise than LlamaRMSNorm, which stays.)"""

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return call_op("rms_norm", x, self.weight, self.eps)


def context_limit(model: PreTrainedModel) -> int:
    """Tokens of prompt and answer the model's positions are made for."""
    return int(model.config.max_position_embeddings)


def eos_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """The model's end-of-sequence ids, as `model.generate` would use them."""
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = model.config.eos_token_id
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def _source(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """from_pretrained's arguments for a folder, a hub name or a .gguf file."""
    path = os.path.expanduser(path)
    if path.endswith(".gguf"):
        return str(Path(path).parent), {"gguf_file": Path(path).name}
    return path, {}


def _has_tokenizer(path: str) -> bool:
    folder = Path(path)
    return not folder.is_dir() or any(folder.glob("tokenizer*"))


def _name(model: PreTrainedModel) -> str:
    where = getattr(model.config, "name_or_path", "")
    return f"{type(model).__name__} ({where})" if where else type(model).__name__


def _check_model(model: object, argument: str, known: tuple[str, ...]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{argument} is of type {type(model).__name__}, expected a transformers model or a path to one")
    kind = type(model).__name__
    if kind not in known or not type(model).__module__.startswith("transformers."):
        expected = f"transformers' {' or '.join(known)}"
        if known is REWARD_MODELS:
            expected += ", or a function of texts: rm(prompts, answers) -> floats"
        raise ValueError(f"{argument} is a {kind}, not tested with STARS decoding; expected {expected}")
    assert isinstance(model, PreTrainedModel)
    rope = (model.config.rope_parameters or {}).get("rope_type", "default")
    if rope in BATCH_DEPENDENT_ROPE:
        raise ValueError(
            f"{argument} {_name(model)} has rope_type {rope!r}, whose frequencies depend on the longest row of a "
            "batch, so other prompts would change an answer; expected another rope_type"
        )
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type not in ops.DEVICES:
        raise ValueError(
            f"{argument} {_name(model)} lies on {sorted(map(str, devices))}, expected one device of {ops.DEVICES}"
        )


def _check_same_tokenizer(
    rm: PreTrainedModel,
    rm_tokenizer: PreTrainedTokenizerBase | None,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """The reward model reads the language model's token ids, so both must mean the same text."""
    name, size, expected = _name(rm), rm.config.vocab_size, lm.config.vocab_size
    if size != expected:
        raise ValueError(
            f"rm {name} has a vocabulary of {size} tokens and the language model one of {expected}: another tokenizer; "
            "expected a reward model that reads the language model's token ids (or pass a callable)"
        )
    if rm_tokenizer is None or tokenizer is None:
        return
    ours, theirs = tokenizer.get_vocab(), rm_tokenizer.get_vocab()
    different = [token for token, i in theirs.items() if ours.get(token) != i] or sorted(set(ours) - set(theirs))
    if different:
        raise ValueError(
            f"rm {name} has another tokenizer than the language model: {len(different)} tokens differ, the first is "
            f"{different[0]!r}; expected the same tokenizer (or pass a callable)"
        )
