"""Reward models of transformers: which classes are taken, how they are loaded and checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stars_kernels.hf.families import CLASSIFIERS
from stars_kernels.hf.loading.language_model import check_model, has_tokenizer, name_of, reading, unwrapped
from stars_kernels.hf.view.layout import vocabulary

PROCESS_MODELS = tuple(
    f"{family}ForTokenClassification"
    for family in """
        Arcee AXK1 DeepseekV3 DiffLlama Exaone4 Gemma Gemma2 Glm Glm4 GptOss Helium Llama Ministral Ministral3 Mistral
        Mixtral Nemotron Persimmon Phi Phi3 Qwen2 Qwen2Moe Qwen3 Qwen3Moe SeedOss SmolLM3 StableLm Starcoder2
    """.split()
)
"""Decoders whose scores of steps are tested equal to their own."""
ENCODERS = tuple(
    f"{family}ForSequenceClassification"
    for family in ("Bert", "DebertaV2", "DistilBert", "Electra", "ModernBert", "Roberta", "XLMRoberta")
)
"""Encoders whose rewards are tested equal to their own pipeline's."""
REWARD_MODELS = (*CLASSIFIERS, *PROCESS_MODELS, *ENCODERS)
BACKBONES = {name.replace("ForSequenceClassification", "Model") for name in CLASSIFIERS}
"""Decoders on which a head of the user's may stand."""
BACKBONE_EXPECTED = "a decoder of a tested family under head="
EXPECTED = (
    "a sequence classifier or a token classifier of a tested family, or a function of texts: "
    "reward_model(prompts, answers) -> floats"
)


class TokenizerMissing(ValueError):
    """The language model's tokenizer is needed; `why` says what for, without how to pass it."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{why}: pass tokenizer=")
        self.why = why


@dataclass(frozen=True)
class Loaded:
    """A reward model in memory, and its tokenizer where that is known."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    outputs: int | None = None
    """Of a head that is not the model's own, how many outputs it has."""

    @property
    def name(self) -> str:
        return name_of(self.model)

    @property
    def labels(self) -> int:
        """How many outputs it has."""
        if self.outputs is not None:
            return self.outputs
        weight = getattr(getattr(self.model, "score", None), "weight", None)  # of an encoder, the head has another name
        return len(weight) if isinstance(weight, Tensor) else self.model.config.num_labels or 1

    def label(self, given: int | None) -> int:
        """The index of the output that is the reward."""
        labels = self.labels
        if given is None and labels != 1:
            raise ValueError(
                f"reward_model {self.name} has {labels} labels, expected 1; say which one is the reward with "
                "RewardModel(model, label=...)"
            )
        if given is not None and not 0 <= given < labels:
            raise ValueError(
                f"label is {given}, but reward_model {self.name} has {labels} labels, expected 0 to {labels - 1}"
            )
        return given or 0

    def own_tokenizer(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
        """What tokenises the text it reads: its own, or the language model's where its ids mean the same here."""
        if tokenizer is None:
            raise TokenizerMissing(f"reward_model {self.name} reads text, which needs the language model's tokenizer")
        if self.tokenizer is None:
            self.reads_ids(lm, tokenizer)
            return tokenizer
        return self.checked(self.tokenizer)

    def checked(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Its tokenizer, whose ids have embeddings; but for the pad token's, which is not read."""
        size = vocabulary(self.model)
        highest = max((i for i in tokenizer.get_vocab().values() if i != tokenizer.pad_token_id), default=-1)
        if highest >= size:
            raise ValueError(
                f"reward_model {self.name}: its tokenizer has ids up to {highest}, but it has {size} embeddings; "
                "expected the "
                "tokenizer that it was trained with"
            )
        return tokenizer

    def vocabularies(self, lm: PreTrainedModel) -> tuple[int, int]:
        """The sizes of its own and of the language model's."""
        return vocabulary(self.model), vocabulary(lm)

    def shares_ids(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> bool:
        """Whether the language model's token ids mean the same text to it.

        Where one of the tokenizers is not at hand, vocabularies of one size are taken for the same.
        """
        size, expected = self.vocabularies(lm)
        if self.tokenizer is None or tokenizer is None:
            return size == expected
        theirs = self.tokenizer.get_vocab()
        return size >= expected and all(theirs.get(token) == i for token, i in tokenizer.get_vocab().items())

    def reads_ids(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> bool:
        """As `shares_ids`; an error where it must read text and a tokenizer for that is missing."""
        shared = self.shares_ids(lm, tokenizer)
        if not shared and (self.tokenizer is None or tokenizer is None):
            size, expected = self.vocabularies(lm)
            why = (
                f"reward_model {self.name} has a vocabulary of {size} tokens and the language model one of {expected}: "
                "another "
                "tokenizer, so it reads text, which needs "
            )
            if self.tokenizer is None:
                raise ValueError(f"{why}both tokenizers: pass RewardModel(model, tokenizer)")
            raise TokenizerMissing(f"{why}the language model's tokenizer as well")
        return shared


def load_reward_model(
    model: PreTrainedModel | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
) -> Loaded:
    """The model itself; or, from a path, the class that its checkpoint names and its tokenizer.

    A head that is not in the checkpoint is refused, as its rewards would be random.
    """
    if isinstance(model, str | os.PathLike):
        path = os.path.expanduser(model)
        with reading("reward_model", path):
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            _check_class(path, config.architectures)
            loaded, info = _auto_class(config.architectures).from_pretrained(
                path, trust_remote_code=trust_remote_code, dtype="auto", use_safetensors=True, output_loading_info=True
            )
        new = sorted(info["missing_keys"])
        check_model(loaded, "reward_model", REWARD_MODELS, EXPECTED)
        if tokenizer is None and has_tokenizer(path):
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    else:
        loaded = unwrapped(model, "reward_model")
        check_model(loaded, "reward_model", REWARD_MODELS, EXPECTED)
        new = _new_parameters(loaded)
    if new:
        raise ValueError(
            f"reward_model {name_of(loaded)}: its head {new[0]} is not in the checkpoint and was newly initialised, so "
            "its "
            "rewards are random; expected a trained reward model (if you trained the head in memory, save and load the "
            "model)"
        )
    return Loaded(loaded, tokenizer)


def load_backbone(
    model: PreTrainedModel | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
) -> Loaded:
    """The decoder under a head of the user's, without the heads of its own, and its tokenizer where that is known."""
    if not isinstance(model, str | os.PathLike):
        whole = unwrapped(model, "reward_model")
        backbone: Any = whole.base_model if isinstance(whole, PreTrainedModel) else whole
        check_model(backbone, "reward_model", BACKBONES, BACKBONE_EXPECTED)
        return Loaded(backbone, tokenizer)
    path = os.path.expanduser(model)
    with reading("reward_model", path):
        loaded, info = AutoModel.from_pretrained(
            path, trust_remote_code=trust_remote_code, dtype="auto", use_safetensors=True, output_loading_info=True
        )
    check_model(loaded, "reward_model", BACKBONES, BACKBONE_EXPECTED)
    if new := sorted(info["missing_keys"]):
        raise ValueError(
            f"reward_model {path!r} has no {new[0]} in its checkpoint, which would be random; expected all weights of "
            f"a {type(loaded).__name__} beside the head"
        )
    if tokenizer is None and has_tokenizer(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    return Loaded(loaded, tokenizer)


def _new_parameters(model: PreTrainedModel) -> list[str]:
    """Of a model that the caller has loaded, the parameters of its head that were not in the checkpoint."""
    if not any(getattr(p, "_is_hf_initialized", False) for p in model.parameters()):
        return []
    backbone = f"{model.base_model_prefix}."
    heads = [(name, p) for name, p in model.named_parameters() if not name.startswith(backbone)]
    if any(".modules_to_save." in name for name, _ in heads):  # came with PEFT's adapters, trained
        return []
    return [name for name, p in heads if not getattr(p, "_is_hf_initialized", False)]


def _check_class(path: str, architectures: list[str] | None) -> None:
    """Refuse a checkpoint of a class that transformers has not: what stands on its backbone would be left out."""
    for kind in (architectures or [])[:1]:
        if not hasattr(transformers, kind):
            raise ValueError(
                f"reward_model {path!r} is a {kind}, which transformers does not know; pass "
                f"RewardModel.from_pretrained({path!r}) for a published form, else RewardModel({path!r}, head=...); "
                f"expected {EXPECTED}"
            )


def _auto_class(architectures: list[str] | None) -> Any:
    name = architectures[0] if architectures else ""
    if name.endswith("ForTokenClassification"):
        return AutoModelForTokenClassification
    return AutoModelForSequenceClassification
