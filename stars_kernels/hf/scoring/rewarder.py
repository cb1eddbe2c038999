"""The scorer that each kind of reward model becomes: the one place that tells the kinds apart."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stars_kernels.decoder.protocols import Scorer
from stars_kernels.hf.cache.hidden import HiddenStates
from stars_kernels.hf.loading.language_model import (
    ModelOrPath,
    load_language_model,
    score_head,
)
from stars_kernels.hf.loading.reward_model import ENCODERS, PROCESS_MODELS, Loaded, TokenizerMissing, load_reward_model
from stars_kernels.hf.modes import in_callers_mode, without_autocast
from stars_kernels.hf.scoring.chunks import Chunks
from stars_kernels.hf.scoring.classifier import ClassifierScorer
from stars_kernels.hf.scoring.encoder import EncoderScorer
from stars_kernels.hf.scoring.function import CallableScorer, RewardFunction
from stars_kernels.hf.scoring.likelihood import LikelihoodScorer, likelihood_chunks
from stars_kernels.hf.scoring.own_head import OwnHeadScorer, head_rewards
from stars_kernels.hf.scoring.process import ProcessScorer
from stars_kernels.hf.scoring.reward_model import Likelihood, Reward, RewardModel, is_function, reward_models
from stars_kernels.hf.scoring.text import TextClassifierScorer
from stars_kernels.hf.scoring.total import SumScorer
from stars_kernels.hf.text.prompts import Codec, Prompt
from stars_kernels.hf.text.templates import Template, TextPrompt
from stars_kernels.hf.view.copying import eval_copy, view_of
from stars_kernels.hf.view.layout import context_limit, layout_of, text_config


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
    decoders: tuple[tuple[str, PreTrainedModel], ...] = ()
    """The models that keep what rows of the language model's tokens leave behind, each with its name."""


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
        self.decoders = [decoder for part in self.parts for decoder in part.decoders]

    def scorer(
        self, prompts: Sequence[Prompt], codec: Codec, device: torch.device, hidden: HiddenStates | None = None
    ) -> Scorer:
        """For one lock-step batch; device: of the language model; hidden: its states, where `reads_hidden`."""
        texts = [TextPrompt(prompt, codec) for prompt in prompts]
        scorers = [part.scorer(texts, device, hidden) for part in self.parts]
        if self.weights == [1.0]:
            return scorers[0]
        return SumScorer(list(zip(scorers, self.weights, strict=True)))


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
    decoders = list[tuple[str, PreTrainedModel]]()
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
        decoders.append((loaded.name, view))
    views = [view for _, view in decoders]
    chunks, limit = likelihood_chunks(views[0]), min(map(context_limit, views))
    policy, reference = views[0], views[1] if len(views) == 2 else None
    return Part(
        lambda *batch: LikelihoodScorer(policy, reference, chunks),
        nn.ModuleList(views),
        limit,
        decoders=tuple(decoders),
    )


def _classifier(
    rm: RewardModel, loaded: Loaded, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Part:
    rm.takes_only("a sequence classifier", "tokenizer", "template", "label")
    score_head(loaded.model, "rm")  # refuses a head that is not linear
    label, chunks, view = loaded.label(rm.label), Chunks(), view_of(loaded.model)
    if rm.template is None and loaded.reads_ids(lm, tokenizer):
        limit, body = context_limit(loaded.model), cast(PreTrainedModel, view.base_model)
        decoders = ((loaded.name, body),)
        return Part(lambda *batch: ClassifierScorer(view, label, chunks), body, limit, decoders=decoders)
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
