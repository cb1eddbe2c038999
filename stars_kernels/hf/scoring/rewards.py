"""Reward models: what the user may pass as one, and the scorer it becomes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from numbers import Integral
from typing import TypeGuard, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stars_kernels.decoder.config import finite, shown
from stars_kernels.decoder.protocols import Scorer
from stars_kernels.hf.cache.hidden import HiddenStates
from stars_kernels.hf.loading.language_model import (
    ModelOrPath,
    check_path,
    check_tokenizer,
    load_language_model,
    score_head,
)
from stars_kernels.hf.loading.reward_model import ENCODERS, PROCESS_MODELS, Loaded, TokenizerMissing, load_reward_model
from stars_kernels.hf.modes import in_callers_mode, without_autocast
from stars_kernels.hf.scoring.scorers import (
    REDUCE,
    CallableScorer,
    Chunks,
    ClassifierScorer,
    EncoderScorer,
    LikelihoodScorer,
    OwnHeadScorer,
    ProcessScorer,
    Reduce,
    RewardFunction,
    SumScorer,
    TextClassifierScorer,
    head_rewards,
    likelihood_chunks,
)
from stars_kernels.hf.text.prompts import Codec, Prompt
from stars_kernels.hf.text.templates import Template, TextPrompt, check_template
from stars_kernels.hf.view.copying import eval_copy, view_of
from stars_kernels.hf.view.layout import context_limit, layout_of, text_config


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


@dataclass(frozen=True)
class RewardModel:
    """A reward model and what the engine needs to know of it; its kind follows from `model`.

    model: a sequence classifier (a decoder or an encoder), a token classifier that scores steps, or a folder or hub
        name of one; a `Likelihood`; a head on the language model's own hidden states, any other module that maps
        [R, D] to [R, 1]; or a function rm(prompts, answers) -> floats on texts.
    tokenizer: its tokenizer. A decoder with the language model's own reads token ids, any other reads text. (A model
        that is loaded here brings its own; without one, vocabularies of one size are taken for the same.)
    template: how prompt and answer become the text it reads: a format string with {prompt} and {answer}, or a function
        (prompt: str or messages, answer) -> text. None = for a chat its tokenizer's chat template, where there is one,
        with the answer as the last turn; else the answer behind the prompt (for an encoder: the pair of both).
    weight: of its reward in a sum of several, or by itself.
    label: the output that is the reward, for models with several.
    step: what ends a step of an answer, for a token classifier.
    reduce: the reward of the steps' probabilities: "min", "mean", "prod" or "last".
    """

    model: ModelOrPath | Likelihood | nn.Module | RewardFunction
    tokenizer: PreTrainedTokenizerBase | None = None
    template: Template | None = None
    weight: float = 1.0
    label: int | None = None
    step: str = "\n\n"
    reduce: Reduce = "min"

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer)
        check_template(self.template)
        if finite(self.weight) is None:
            raise TypeError(f"weight is {shown(self.weight)}, expected a finite number")
        if self.label is not None and (isinstance(self.label, bool) or not isinstance(self.label, Integral)):
            raise TypeError(f"label is {self.label!r}, expected an integer or None")
        if not isinstance(self.step, str) or not self.step:
            raise TypeError(f"step is {self.step!r}, expected a non-empty string")
        if self.reduce not in REDUCE:
            raise ValueError(f"reduce is {self.reduce!r}, expected one of {', '.join(REDUCE)}")

    def takes_only(self, kind: str, *names: str) -> None:
        """Refuse a setting that means nothing to this kind of reward model."""
        for field in fields(self):
            if field.default is not MISSING and field.name not in ("weight", *names):
                value = getattr(self, field.name)
                if value is not field.default and value != field.default:
                    raise ValueError(
                        f"{field.name} is given, but rm is {kind}, which takes none; expected no {field.name}="
                    )


OneReward = ModelOrPath | Likelihood | nn.Module | RewardModel | RewardFunction
Reward = OneReward | Sequence[OneReward]
"""What `decode` takes as its reward model: one, or several whose weighted sum is the reward."""


@dataclass(frozen=True)
class Part:
    """One reward model, ready to score."""

    scorer: Callable[[Sequence[TextPrompt], torch.device, HiddenStates | None], Scorer]
    """For one lock-step batch: its prompts, the device where rewards are wanted, the language model's hidden states."""
    body: nn.Module | None = None
    """The module whose linear layers may be packed. (A head is read at one token alone, by an op of its own.)"""
    limit: int = sys.maxsize
    """Tokens of prompt and answer that it can read, in the language model's; what reads text checks each text."""
    reads_hidden: bool = False
    """Whether it wants hidden states."""


class Rewarder:
    """The reward models of one call."""

    def __init__(
        self,
        rm: Reward,
        language_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        trust_remote_code: bool,
    ) -> None:
        described = reward_models(rm)
        self.weights = [float(part.weight) for part in described]
        self.parts = [_part(part, language_model, tokenizer, trust_remote_code) for part in described]
        self.bodies = [part.body for part in self.parts if part.body is not None]
        self.limit = min(part.limit for part in self.parts)
        self.reads_hidden = any(part.reads_hidden for part in self.parts)

    def scorer(
        self, prompts: Sequence[Prompt], codec: Codec, device: torch.device, hidden: HiddenStates | None = None
    ) -> Scorer:
        """For one lock-step batch; device: of the language model; hidden: its states, where `reads_hidden`."""
        texts = [TextPrompt(prompt, codec) for prompt in prompts]
        scorers = [part.scorer(texts, device, hidden) for part in self.parts]
        if self.weights == [1.0]:
            return scorers[0]
        return SumScorer(list(zip(scorers, self.weights, strict=True)))


def reward_models(rm: Reward) -> list[RewardModel]:
    """One entry a part."""
    several = isinstance(rm, list | tuple)
    parts = list(cast(Sequence[OneReward], rm)) if several else [cast(OneReward, rm)]
    if not parts:
        raise ValueError("rm is an empty list, expected at least one reward model")
    for i, part in enumerate(parts):
        if not (isinstance(part, RewardModel | Likelihood | nn.Module | str | os.PathLike) or callable(part)):
            raise TypeError(
                f"{f'rm[{i}]' if several else 'rm'} is of type {type(part).__name__}, expected a reward model or "
                "a path to one, RewardModel(..., weight=), a Likelihood, a head or a function of texts"
            )
    return [part if isinstance(part, RewardModel) else RewardModel(cast(ModelOrPath, part)) for part in parts]


def check_reward(rm: Reward) -> None:
    """What can be refused before anything is loaded."""
    for part in reward_models(rm):
        model = part.model
        if isinstance(model, str | os.PathLike) and os.fspath(model).endswith(".gguf"):
            raise ValueError(
                f"rm is {os.fspath(model)!r}, and a .gguf file holds no reward head; "
                "expected a folder, a hub name or a function of texts"
            )
        for name, path in model.models.items() if isinstance(model, Likelihood) else [("rm", model)]:
            check_path(name, path)


def is_function(rm: object) -> TypeGuard[RewardFunction]:
    return callable(rm) and not isinstance(rm, nn.Module)


def _part(
    rm: RewardModel,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
) -> Part:
    """The one place that tells the kinds apart."""
    if is_function(rm.model):
        return _function(rm, rm.model, tokenizer)
    model = rm.model
    if isinstance(model, Likelihood):
        return _likelihood(rm, model, lm, tokenizer, trust_remote_code)
    if isinstance(model, nn.Module) and not hasattr(model, "config"):  # which all models have, PEFT's too
        return _own_head(rm, model, lm)
    loaded = load_reward_model(cast(ModelOrPath, model), rm.tokenizer, trust_remote_code)
    kind = type(loaded.model).__name__
    if kind in ENCODERS:
        return _encoder(rm, loaded, tokenizer)
    if kind in PROCESS_MODELS:
        return _process(rm, loaded, lm, tokenizer)
    return _classifier(rm, loaded, lm, tokenizer)


def _function(rm: RewardModel, function: RewardFunction, tokenizer: PreTrainedTokenizerBase | None) -> Part:
    rm.takes_only("a function of texts")
    if tokenizer is None:
        raise TokenizerMissing("rm is a function of texts, which needs a tokenizer")
    called = in_callers_mode(function)
    return Part(lambda prompts, device, _: CallableScorer(called, prompts, device))


def _template(template: Template | None) -> Template | None:
    """The template, called in the caller's mode where it is a function."""
    return in_callers_mode(template) if callable(template) else template


def _own_head(rm: RewardModel, head: nn.Module, lm: PreTrainedModel) -> Part:
    rm.takes_only("a head on hidden states")
    devices = {str(tensor.device) for tensor in (*head.parameters(), *head.buffers())} - {str(lm.device)}
    if devices:
        raise ValueError(f"rm is a head on {devices.pop()}, expected the language model's {lm.device}")
    copy = eval_copy(head)
    output = lm.get_output_embeddings()
    size = text_config(lm).hidden_size if output is None else output.weight.shape[1]
    try:
        with torch.inference_mode(), without_autocast():
            states = torch.zeros(1, 1, size, dtype=lm.dtype, device=lm.device)
            head_rewards(copy, states, torch.zeros(1, dtype=torch.int64, device=lm.device))
    except Exception as error:  # whatever a module raises that is no head
        raise ValueError(
            f"rm {type(head).__name__} was taken for a head on hidden states [R, {size}], and a trial call failed: "
            f"{type(error).__name__}: {error}; expected a module [R, {size}] -> [R, 1], or a function of texts"
        ) from error

    def scorer(prompts: Sequence[TextPrompt], device: torch.device, hidden: HiddenStates | None) -> Scorer:
        assert hidden is not None
        return OwnHeadScorer(copy, hidden)

    return Part(scorer, copy, reads_hidden=True)


def _likelihood(
    rm: RewardModel,
    likelihood: Likelihood,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
) -> Part:
    rm.takes_only("a likelihood", "tokenizer")
    views = []
    for name, given in likelihood.models.items():
        model, own = load_language_model(given, rm.tokenizer, trust_remote_code, name)
        loaded, view = Loaded(model, own), view_of(model)
        if layout_of(view).steps:
            raise ValueError(
                f"{name} {loaded.name} reads one token at a time behind a state, expected a model that scores several"
            )
        if not loaded.shares_ids(lm, tokenizer):
            size, expected = loaded.vocabularies(lm)
            raise ValueError(
                f"{name} {loaded.name} (a vocabulary of {size} tokens) has another tokenizer than the language model "
                f"({expected}), expected the same: a likelihood is of the language model's token ids"
            )
        views.append(view)
    chunks, limit = likelihood_chunks(views[0]), min(map(context_limit, views))
    policy, reference = views[0], views[1] if len(views) == 2 else None
    return Part(lambda *batch: LikelihoodScorer(policy, reference, chunks), nn.ModuleList(views), limit)


def _classifier(
    rm: RewardModel, loaded: Loaded, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Part:
    rm.takes_only("a sequence classifier", "tokenizer", "template", "label")
    score_head(loaded.model, "rm")  # refuses a head that is not linear
    label, chunks, view = loaded.label(rm.label), Chunks(), view_of(loaded.model)
    if rm.template is None and loaded.reads_ids(lm, tokenizer):
        limit = context_limit(loaded.model)
        return Part(lambda prompts, device, _: ClassifierScorer(view, label, chunks), view.base_model, limit)
    own, template = loaded.own_tokenizer(lm, tokenizer), _template(rm.template)
    return Part(
        lambda prompts, device, _: TextClassifierScorer(view, label, own, template, prompts, device, chunks),
        view.base_model,
    )


def _process(rm: RewardModel, loaded: Loaded, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Part:
    rm.takes_only("a token classifier", "tokenizer", "label", "step", "reduce")
    if loaded.labels == 1:
        raise ValueError(f"rm {loaded.name} has 1 label, whose probability is always 1; expected 2 or more")
    label, chunks, view = loaded.label(rm.label), Chunks(), view_of(loaded.model)
    own = loaded.own_tokenizer(lm, tokenizer)
    return Part(
        lambda prompts, device, _: ProcessScorer(view, label, own, rm.step, rm.reduce, prompts, device, chunks),
        view.base_model,
    )


def _encoder(rm: RewardModel, loaded: Loaded, tokenizer: PreTrainedTokenizerBase | None) -> Part:
    rm.takes_only("an encoder", "tokenizer", "template", "label")
    own = loaded.tokenizer
    if own is None:
        raise ValueError(
            f"rm {loaded.name} has no tokenizer, without which it reads no text: pass RewardModel(rm, tokenizer)"
        )
    if tokenizer is None:
        raise TokenizerMissing(f"rm {loaded.name} reads text, which needs the language model's tokenizer")
    loaded.checked(own)
    label, chunks, copy = loaded.label(rm.label), Chunks(), eval_copy(loaded.model)
    template = _template(rm.template)
    return Part(lambda prompts, device, _: EncoderScorer(copy, label, own, template, prompts, device, chunks), copy)
