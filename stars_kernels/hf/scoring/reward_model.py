"""What a user may pass as a reward model, and how it is described and checked before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from numbers import Integral
from typing import Any, TypeGuard, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from stars_kernels.decoder.checks import finite, shown
from stars_kernels.hf.loading.language_model import ModelOrPath, check_path, check_tokenizer
from stars_kernels.hf.loading.presets import preset
from stars_kernels.hf.scoring.function import RewardFunction
from stars_kernels.hf.scoring.process import REDUCE, Reduce
from stars_kernels.hf.scoring.tokens import Token, check_tokens
from stars_kernels.hf.text.templates import Template, check_template


@dataclass(frozen=True)
class Likelihood:
    """As a reward: log p(answer | prompt) under `model`, less that under `reference`; 0 for the empty answer.

    A sum over the answer's tokens, an EOS included, at temperature 1 and unfiltered. With the policy that DPO has
    trained, the reference that it started from, and its beta as `weight` of the `RewardModel`, this is DPO's implicit
    reward (arXiv 2305.18290), up to a constant of the prompt.

    model, reference: causal language models that read the decoded model's token ids, their folders or hub names.
    """

    model: ModelOrPath
    reference: ModelOrPath | None = None

    def __post_init__(self) -> None:
        for name, model in self.models.items():
            if not isinstance(model, nn.Module | str | os.PathLike):
                kind = type(model).__name__
                raise TypeError(f"{name} is of type {kind}, expected a causal language model or a path to one")

    @property
    def models(self) -> dict[str, ModelOrPath]:
        """What messages call them, the policy first."""
        reference = {} if self.reference is None else {"the likelihood's reference": self.reference}
        return {"the likelihood's model": self.model, **reference}


Head = nn.Module | str | tuple[str, nn.Module]


@dataclass(frozen=True)
class RewardModel:
    """A reward model and what the engine needs to know of it; its kind follows from `model`.

    model: a sequence classifier (a decoder or an encoder), a token classifier that scores steps, or a folder or hub
        name of one; a `Likelihood`; a head on the language model's own hidden states, any other module that maps
        [R, D] to [R, 1]; or a function reward_model(prompts, answers) -> floats on texts.
    tokenizer: its tokenizer. A decoder with the language model's own reads token ids, any other reads text. (A model
        that is loaded here brings its own; without one, vocabularies of one size are taken for the same.)
    template: how prompt and answer become the text it reads: a format string with {prompt} and {answer}, or a function
        (prompt: str or messages, answer) -> text. None = for a chat its tokenizer's chat template, where there is one,
        with the answer as the last turn; else the answer behind the prompt (for an encoder: the pair of both).
    weight: of its reward in a sum of several, or by itself.
    label: the output that is the reward, for models with several.
    step: what ends a step of an answer, for a token classifier.
    reduce: the reward of the steps' probabilities: "min", "mean", "prod" or "last".
    head: what stands on `model`'s backbone in the place of a head that transformers knows: any module [R, D] -> [R, K],
        or a `GatedHead`; the prefix of its keys in the checkpoint (of a model in memory, the name of its module); or
        (prefix, module), a module whose weights lie there.
    tokens: of a causal language model, the tokens whose logits at the text's end, or at each step's, are the reward:
        of one its logit, of several the softmax probability, among them, of the first. Texts of one token, or ids.
    mark: closes each step, for `head` or `tokens`: a step's probability is read at its last token.
    between: stands behind a mark and before the next step.
    """

    model: ModelOrPath | Likelihood | nn.Module | RewardFunction
    tokenizer: PreTrainedTokenizerBase | None = None
    template: Template | None = None
    weight: float = 1.0
    label: int | None = None
    step: str = "\n\n"
    reduce: Reduce = "min"
    head: Head | None = None
    tokens: tuple[Token, ...] | None = None
    mark: str | None = None
    between: str = ""

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer)
        check_template(self.template)
        if finite(self.weight) is None:
            raise TypeError(f"weight is {shown(self.weight)}, expected a finite number")
        if self.label is not None and (isinstance(self.label, bool) or not isinstance(self.label, Integral)):
            raise TypeError(f"label is {self.label!r}, expected an integer or None")
        if not isinstance(self.step, str) or not self.step:
            raise TypeError(f"step is {self.step!r}, expected a non-empty string")
        check_head(self.head)
        check_tokens(self.tokens)
        if self.mark is not None and (not isinstance(self.mark, str) or not self.mark):
            raise TypeError(f"mark is {self.mark!r}, expected a non-empty string or None")
        if not isinstance(self.between, str):
            raise TypeError(f"between is {self.between!r}, expected a string")
        if self.mark is None and self.between:
            raise ValueError(f"between is {self.between!r} without a mark, expected mark= with it")
        if self.reduce not in REDUCE:
            raise ValueError(f"reduce is {self.reduce!r}, expected one of {', '.join(REDUCE)}")

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **settings: Any) -> RewardModel:
        """Describe a published reward model by what its hub name or its config tells; no remote code runs.

        name: a folder or hub name. settings: of the `RewardModel`, in the place of the form's own.

        Raises:
            OSError: its config cannot be read.
            ValueError: it has a form that is not known; the message says which, and what to pass.
        """
        return cls(name, **{**preset(name), **settings})

    def takes_only(self, kind: str, *names: str) -> None:
        """Refuse a setting that means nothing to this kind of reward model."""
        for field in fields(self):
            if field.default is not MISSING and field.name not in ("weight", *names):
                value = getattr(self, field.name)
                if value is not field.default and value != field.default:
                    raise ValueError(
                        f"{field.name} is given, but reward_model is {kind}, which takes none; expected no "
                        f"{field.name}="
                    )


OneReward = ModelOrPath | Likelihood | nn.Module | RewardModel | RewardFunction
Reward = OneReward | Sequence[OneReward]
"""What `decode` takes as its reward model: one, or several whose weighted sum is the reward."""


def reward_models(reward_model: Reward) -> list[RewardModel]:
    """One entry a part."""
    several = isinstance(reward_model, list | tuple)
    parts = list(cast(Sequence[OneReward], reward_model)) if several else [cast(OneReward, reward_model)]
    if not parts:
        raise ValueError("reward_model is an empty list, expected at least one reward model")
    for i, part in enumerate(parts):
        if not (isinstance(part, RewardModel | Likelihood | nn.Module | str | os.PathLike) or callable(part)):
            raise TypeError(
                f"{f'reward_model[{i}]' if several else 'reward_model'} is of type {type(part).__name__}, expected a "
                "reward model or "
                "a path to one, RewardModel(..., weight=), a Likelihood, a head or a function of texts"
            )
    return [part if isinstance(part, RewardModel) else RewardModel(cast(ModelOrPath, part)) for part in parts]


def check_reward(reward_model: Reward) -> None:
    """What can be refused before anything is loaded."""
    for part in reward_models(reward_model):
        model = part.model
        if isinstance(model, str | os.PathLike) and os.fspath(model).endswith(".gguf"):
            raise ValueError(
                f"reward_model is {os.fspath(model)!r}, and a .gguf file holds no reward head; "
                "expected a folder, a hub name or a function of texts"
            )
        for name, path in model.models.items() if isinstance(model, Likelihood) else [("reward_model", model)]:
            check_path(name, path)


def check_head(head: object) -> None:
    if isinstance(head, tuple):
        known = len(head) == 2 and isinstance(head[0], str) and isinstance(head[1], nn.Module)
    else:
        known = head is None or isinstance(head, nn.Module) or (isinstance(head, str) and bool(head))
    if not known:
        raise TypeError(
            f"head is {shown(head)}, expected a module, the prefix of its keys in the checkpoint or (prefix, module)"
        )


def is_function(reward_model: object) -> TypeGuard[RewardFunction]:
    return callable(reward_model) and not isinstance(reward_model, nn.Module)
