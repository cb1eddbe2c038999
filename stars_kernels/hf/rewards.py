"""Reward models: what the user may pass as one, how it is loaded and checked, and the scorer it becomes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TypeGuard, cast

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from stars_kernels.decoder.protocols import Scorer
from stars_kernels.hf.families import CLASSIFIERS
from stars_kernels.hf.models import (
    ModelOrPath,
    check_model,
    check_path,
    check_tokenizer,
    context_limit,
    has_tokenizer,
    name_of,
    score_head,
    text_config,
    unwrapped,
    view_of,
)
from stars_kernels.hf.prompts import Codec, Prompt
from stars_kernels.hf.scorers import CallableScorer, ClassifierScorer, RewardFunction


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


Reward = ModelOrPath | RewardModel | RewardFunction
"""What `decode` takes as its reward model."""


class Rewarder:
    """The reward model of one call."""

    def __init__(
        self,
        rm: Reward,
        language_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        trust_remote_code: bool,
    ) -> None:
        self.function: RewardFunction | None = None
        self.bodies: list[nn.Module] = []
        """The modules whose linear layers may be packed. (A head is read at one token alone, by an op of its own.)"""
        self.limit = sys.maxsize
        """Tokens of prompt and answer that it can read."""
        if is_function(rm):
            if tokenizer is None:
                raise ValueError("rm is a function of texts, which needs a tokenizer: pass tokenizer=")
            self.function = rm
            return
        described = rm if isinstance(rm, RewardModel) else RewardModel(cast(ModelOrPath, rm))
        model, self.label = load_reward_model(described, language_model, tokenizer, trust_remote_code)
        self.model = view_of(model)
        self.bodies = [self.model.base_model]
        self.limit = context_limit(self.model)
        if self.model.device != language_model.device:
            raise ValueError(f"rm is on {self.model.device}, expected the language model's {language_model.device}")

    def scorer(self, prompts: Sequence[Prompt], codec: Codec, device: torch.device) -> Scorer:
        """For one lock-step batch; device: of the language model."""
        if self.function is not None:
            return CallableScorer(self.function, [codec.prompt_text(p) for p in prompts], codec.decode, device)
        return ClassifierScorer(self.model, self.label)


def check_reward(rm: object) -> None:
    """What can be refused before anything is loaded."""
    if isinstance(rm, RewardModel):
        check_reward_path(rm.model)
    elif not is_function(rm):
        check_reward_path(rm)


def is_function(rm: object) -> TypeGuard[RewardFunction]:
    return callable(rm) and not isinstance(rm, torch.nn.Module)


def check_reward_path(rm: object) -> None:
    if isinstance(rm, str | os.PathLike) and os.fspath(rm).endswith(".gguf"):
        raise ValueError(
            f"rm is {os.fspath(rm)!r}, and a .gguf file holds no reward head; "
            "expected a folder, a hub name or a function of texts"
        )
    check_path("rm", rm)


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
        if rm_tokenizer is None and has_tokenizer(path):
            rm_tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    model = unwrapped(model, "rm")
    expected = "a causal sequence classifier of a tested family, or a function of texts: rm(prompts, answers) -> floats"
    check_model(model, "rm", CLASSIFIERS, expected)
    name = name_of(model)
    head = score_head(model, "rm").weight  # [labels, D]
    adapted = type(model.score) is not nn.Linear  # a head that came with the adapters is no checkpoint's
    loaded = not adapted and any(getattr(p, "_is_hf_initialized", False) for p in model.parameters())
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


def _check_same_tokenizer(
    rm: PreTrainedModel,
    rm_tokenizer: PreTrainedTokenizerBase | None,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """The reward model reads the language model's token ids, so both must mean the same text."""
    name, size, expected = name_of(rm), text_config(rm).vocab_size, text_config(lm).vocab_size
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
