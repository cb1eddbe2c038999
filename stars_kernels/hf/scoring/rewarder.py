"""The scorer that each kind of reward model becomes: the one place that tells the kinds apart."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stars_kernels.decoder.protocols import Scorer
from stars_kernels.hf.loading.heads import Gated
from stars_kernels.hf.loading.language_model import (
    ModelOrPath,
    load_language_model,
    score_head,
)
from stars_kernels.hf.loading.reward_model import (
    ENCODERS,
    PROCESS_MODELS,
    Loaded,
    TokenizerMissing,
    load_backbone,
    load_reward_model,
)
from stars_kernels.hf.modes import without_autocast
from stars_kernels.hf.scoring.chunks import Chunks
from stars_kernels.hf.scoring.classifier import ClassifierScorer, reward_output
from stars_kernels.hf.scoring.encoder import EncoderScorer
from stars_kernels.hf.scoring.function import CallableScorer, RewardFunction
from stars_kernels.hf.scoring.head import GatedScorer, head_of, head_values, output_of, outputs_of
from stars_kernels.hf.scoring.likelihood import LikelihoodScorer, likelihood_chunks
from stars_kernels.hf.scoring.own_head import OwnHeadScorer, head_rewards
from stars_kernels.hf.scoring.process import MarkedScorer, Marks, ProcessScorer, probability
from stars_kernels.hf.scoring.reader import Values
from stars_kernels.hf.scoring.reward_model import Head, Likelihood, Reward, RewardModel, is_function, reward_models
from stars_kernels.hf.scoring.text import TextClassifierScorer, every_token
from stars_kernels.hf.scoring.tokens import Token, output_layer, token_ids, token_values
from stars_kernels.hf.scoring.total import SumScorer
from stars_kernels.hf.scoring.workplace import TextModel, Workplace
from stars_kernels.hf.view.copying import eval_copy, view_of
from stars_kernels.hf.view.layout import context_limit, layout_of, text_config

STEP_SETTINGS = ("step", "reduce", "mark", "between")


@dataclass(frozen=True)
class Part:
    """One reward model, ready to score."""

    scorer: Callable[[Workplace], Scorer]
    """Makes what scores in a workplace."""
    body: nn.Module | None = None
    """The module whose linear layers may be packed. (A head is read at one token alone, by an op of its own.)"""
    limit: int = sys.maxsize
    """Tokens of prompt and answer that it can read, in the language model's; what reads text checks each text."""
    reads_hidden: bool = False
    """Whether it wants hidden states."""
    decoders: tuple[tuple[str, PreTrainedModel], ...] = ()
    """The models that keep what rows of the language model's tokens leave behind, each with its name."""
    loaded: nn.Module | None = None
    """The user's own module, or the one loaded for them; None = a function."""
    queues: bool = False
    """Whether its scorer is a `QueueingScorer`."""


class Rewarder:
    """The reward models of an engine."""

    def __init__(
        self,
        reward_model: Reward,
        language_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        trust_remote_code: bool,
    ) -> None:
        self.described = reward_models(reward_model)
        self.weights = [float(part.weight) for part in self.described]
        self.parts = [_part(part, language_model, tokenizer, trust_remote_code) for part in self.described]
        self.bodies = [part.body for part in self.parts if part.body is not None]
        self.limit = min(part.limit for part in self.parts)
        self.queues = all(part.queues for part in self.parts)
        self.reads_hidden = any(part.reads_hidden for part in self.parts)
        self.decoders = [decoder for part in self.parts for decoder in part.decoders]

    def scorer(self, place: Workplace) -> Scorer:
        """Make what scores in a workplace."""
        scorers = [part.scorer(place.part(i)) for i, part in enumerate(self.parts)]
        if self.weights == [1.0]:
            return scorers[0]
        return SumScorer(list(zip(scorers, self.weights, strict=True)))


def _part(
    described: RewardModel,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
) -> Part:
    """The one place that tells the kinds apart."""
    if is_function(described.model):
        return _function(described, described.model, tokenizer)
    model = described.model
    if isinstance(model, Likelihood):
        return _likelihood(described, model, lm, tokenizer, trust_remote_code)
    if isinstance(model, nn.Module) and not hasattr(model, "config"):  # which all models have, PEFT's too
        return _own_head(described, model, lm)
    if described.head is not None:
        return _headed(described, described.head, lm, tokenizer, trust_remote_code)
    if described.tokens is not None:
        return _tokens(described, described.tokens, lm, tokenizer, trust_remote_code)
    loaded = load_reward_model(cast(ModelOrPath, model), described.tokenizer, trust_remote_code)
    kind = type(loaded.model).__name__
    if kind in ENCODERS:
        return _encoder(described, loaded, tokenizer)
    if kind in PROCESS_MODELS:
        return _process(described, loaded, lm, tokenizer)
    return _classifier(described, loaded, lm, tokenizer)


def _function(described: RewardModel, function: RewardFunction, tokenizer: PreTrainedTokenizerBase | None) -> Part:
    described.takes_only("a function of texts")
    if tokenizer is None:
        raise TokenizerMissing("reward_model is a function of texts, which needs a tokenizer")
    return Part(lambda place: CallableScorer(function, place))


def _own_head(described: RewardModel, head: nn.Module, lm: PreTrainedModel) -> Part:
    described.takes_only("a head on hidden states")
    devices = {str(tensor.device) for tensor in (*head.parameters(), *head.buffers())} - {str(lm.device)}
    if devices:
        raise ValueError(f"reward_model is a head on {devices.pop()}, expected the language model's {lm.device}")
    copy = eval_copy(head)
    output = lm.get_output_embeddings()
    size = text_config(lm).hidden_size if output is None else output.weight.shape[1]
    try:
        with torch.inference_mode(), without_autocast():
            states = torch.zeros(1, 1, size, dtype=lm.dtype, device=lm.device)
            head_rewards(copy, states, torch.zeros(1, dtype=torch.int64, device=lm.device))
    except Exception as error:  # whatever a module raises that is no head
        raise ValueError(
            f"reward_model {type(head).__name__} was taken for a head on hidden states [R, {size}], and a trial call "
            "failed: "
            f"{type(error).__name__}: {error}; expected a module [R, {size}] -> [R, 1], or a function of texts"
        ) from error

    def scorer(place: Workplace) -> Scorer:
        assert place.hidden is not None
        return OwnHeadScorer(copy, place.hidden)

    return Part(scorer, copy, reads_hidden=True, loaded=head, queues=True)


def _likelihood(
    described: RewardModel,
    likelihood: Likelihood,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
) -> Part:
    described.takes_only("a likelihood", "tokenizer")
    decoders, originals = list[tuple[str, PreTrainedModel]](), list[nn.Module]()
    for name, given in likelihood.models.items():
        model, own = load_language_model(given, described.tokenizer, trust_remote_code, name)
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
        originals.append(model)
    views = [view for _, view in decoders]
    chunks, limit = likelihood_chunks(views[0]), min(map(context_limit, views))
    policy, reference = views[0], views[1] if len(views) == 2 else None
    return Part(
        lambda place: LikelihoodScorer(policy, reference, chunks, place.buffers),
        nn.ModuleList(views),
        limit,
        decoders=tuple(decoders),
        loaded=nn.ModuleList(originals),
    )


def _classifier(
    described: RewardModel, loaded: Loaded, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Part:
    described.takes_only("a sequence classifier", "tokenizer", "template", "label")
    score_head(loaded.model, "reward_model")  # refuses a head that is not linear
    label, chunks, view = loaded.label(described.label), Chunks(), view_of(loaded.model)
    if described.template is None and loaded.reads_ids(lm, tokenizer):
        limit, body = context_limit(loaded.model), cast(PreTrainedModel, view.base_model)
        return Part(
            lambda place: ClassifierScorer(view, label, chunks, place.buffers, place.graphs_for(body)), body, limit,
            decoders=((loaded.name, body),), loaded=loaded.model, queues=True,
        )  # fmt: skip
    text_model = TextModel(view, loaded.own_tokenizer(lm, tokenizer), described.template, chunks)
    values = every_token(reward_output(view, label))
    return Part(partial(TextClassifierScorer, text_model, values), view.base_model, loaded=loaded.model)


def _headed(
    described: RewardModel,
    head: Head,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
) -> Part:
    steps = () if described.mark is None else STEP_SETTINGS
    described.takes_only("a backbone with a head", "tokenizer", "template", "label", "head", *steps)
    model = cast(ModelOrPath, described.model)
    loaded = load_backbone(model, described.tokenizer, trust_remote_code)
    module = eval_copy(head_of(model, head))
    view, chunks = view_of(loaded.model), Chunks()
    loaded = replace(loaded, outputs=outputs_of(module, view))
    originals = nn.ModuleList([loaded.model, module])
    if isinstance(module, Gated) and described.mark is not None:
        raise ValueError(f"mark is {described.mark!r}, but a gated head scores no steps; expected no mark=")
    if described.mark is not None:
        values = probability(head_values(module), _label_of_several(loaded, described.label))
        return _marked(described, described.mark, loaded, view, values, originals, lm, tokenizer)
    if isinstance(module, Gated):
        if described.label is not None:
            raise ValueError(f"label is {described.label}, but a gated head's reward is the sum of its objectives; "
                             "expected no label=")  # fmt: skip
        text_model = TextModel(view, loaded.own_tokenizer(lm, tokenizer), described.template, chunks)
        return Part(partial(GatedScorer, text_model, module), view, loaded=originals)
    output = output_of(module, loaded.label(described.label))
    if described.template is None and loaded.reads_ids(lm, tokenizer):
        return Part(
            lambda place: ClassifierScorer(view, output, chunks, place.buffers), view, context_limit(loaded.model),
            decoders=((loaded.name, view),), loaded=originals,
        )  # fmt: skip
    text_model = TextModel(view, loaded.own_tokenizer(lm, tokenizer), described.template, chunks)
    return Part(partial(TextClassifierScorer, text_model, every_token(output)), view, loaded=originals)


def _tokens(
    described: RewardModel,
    tokens: tuple[Token, ...],
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
) -> Part:
    steps = () if described.mark is None else STEP_SETTINGS
    described.takes_only("a causal language model of tokens", "tokenizer", "template", "tokens", *steps)
    given = cast(ModelOrPath, described.model)
    model, own = load_language_model(given, described.tokenizer, trust_remote_code, "reward_model")
    loaded = Loaded(model, own)
    own = loaded.own_tokenizer(lm, tokenizer)
    values, view = token_values(output_layer(model), token_ids(tokens, model, own)), view_of(model)
    if described.mark is not None:
        return _marked(described, described.mark, loaded, view, values, model, lm, tokenizer)
    text_model = TextModel(view, own, described.template, Chunks())
    return Part(partial(TextClassifierScorer, text_model, values), view.base_model, loaded=model)


def _marked(
    described: RewardModel,
    mark: str,
    loaded: Loaded,
    view: PreTrainedModel,
    values: Values,
    original: nn.Module,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Part:
    text_model = TextModel(view, loaded.own_tokenizer(lm, tokenizer), described.template, Chunks())
    marks = Marks(mark, described.between)
    scorer = partial(MarkedScorer, text_model, values, described.step, described.reduce, marks)
    return Part(scorer, view.base_model, loaded=original)


def _label_of_several(loaded: Loaded, label: int | None) -> int:
    """Return the index of the output whose probability scores a step."""
    if loaded.labels == 1:
        raise ValueError(f"reward_model {loaded.name} has 1 label, whose probability is always 1; expected 2 or more")
    return loaded.label(label)


def _process(
    described: RewardModel, loaded: Loaded, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Part:
    described.takes_only("a token classifier", "tokenizer", "label", "step", "reduce")
    label = _label_of_several(loaded, described.label)
    view, own = view_of(loaded.model), loaded.own_tokenizer(lm, tokenizer)
    text_model, values = TextModel(view, own, None, Chunks()), probability(view.get_submodule("score"), label)
    scorer = partial(ProcessScorer, text_model, values, described.step, described.reduce)
    return Part(scorer, view.base_model, loaded=loaded.model)


def _encoder(described: RewardModel, loaded: Loaded, tokenizer: PreTrainedTokenizerBase | None) -> Part:
    described.takes_only("an encoder", "tokenizer", "template", "label")
    own = loaded.tokenizer
    if own is None:
        raise ValueError(
            f"reward_model {loaded.name} has no tokenizer, without which it reads no text: pass RewardModel(model, "
            "tokenizer)"
        )
    if tokenizer is None:
        raise TokenizerMissing(f"reward_model {loaded.name} reads text, which needs the language model's tokenizer")
    loaded.checked(own)
    copy = eval_copy(loaded.model)
    text_model = TextModel(copy, own, described.template, Chunks())
    return Part(partial(EncoderScorer, text_model, loaded.label(described.label)), copy, loaded=loaded.model)
