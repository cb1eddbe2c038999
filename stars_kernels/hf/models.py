"""The models of an engine: loaded, checked, and made into views with packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stars_kernels.decoder.checks import shown
from stars_kernels.hf.fingerprint import fingerprint_of, reward_fingerprint
from stars_kernels.hf.loading.language_model import (
    ModelOrPath,
    check_path,
    check_tokenizer,
    eos_ids,
    load_language_model,
)
from stars_kernels.hf.proposing.output_layer import why_unfused
from stars_kernels.hf.scoring.reward_model import Reward, check_reward
from stars_kernels.hf.scoring.rewarder import Rewarder
from stars_kernels.hf.sharding import is_sharded
from stars_kernels.hf.sizing import models_in
from stars_kernels.hf.view.copying import view_of
from stars_kernels.hf.view.layout import context_limit, layout_of, vocabulary
from stars_kernels.hf.view.rewrites import merge, pack


class Models:
    """A language model and its reward models, ready to decode.

    lm: the language model's view. rewarder: the reward models. tokenizer: the language model's, where there is one.
    limit: tokens of prompt and answer that all of them can read. eos: the end-of-sequence tokens of the model itself.
    packed_bytes: of packed weights. merged_bytes: of weights that are merged with their siblings'.
    """

    def __init__(
        self,
        model: ModelOrPath,
        reward_model: Reward,
        tokenizer: PreTrainedTokenizerBase | None,
        trust_remote_code: bool,
        pack_as: bool | Literal["bfloat16"],
    ) -> None:
        check_tokenizer(tokenizer)
        check_path("model", model)
        check_reward(reward_model)
        self._original, self.tokenizer = load_language_model(model, tokenizer, trust_remote_code)
        self.lm = view_of(self._original)
        self.rewarder = Rewarder(reward_model, self._original, self.tokenizer, trust_remote_code)
        self.limit = min(context_limit(self.lm), self.rewarder.limit)
        self.eos = eos_ids(self._original)
        self.packed_bytes = self.merged_bytes = 0
        if pack_as:
            dtype = torch.bfloat16 if pack_as == "bfloat16" else torch.float32
            self.packed_bytes = sum(pack(body, dtype) for body in self.bodies)
            self.merged_bytes = sum(merge(body) for body in self.bodies)
        layout_of(self.lm)  # refuses what cannot be decoded exactly

    @cached_property
    def bodies(self) -> list[torch.nn.Module]:
        """The modules whose layers may be packed."""
        return [self.lm, *self.rewarder.bodies]

    @cached_property
    def reward_models(self) -> list[PreTrainedModel]:
        """The transformers models among the reward models."""
        return models_in(self.rewarder.bodies)

    @cached_property
    def sharded(self) -> bool:
        """Whether some of them are shared out between processes."""
        return is_sharded(self.bodies)

    @cached_property
    def why_unfused(self) -> str | None:
        """Why the output layer and the draw cannot be one op, whatever the settings; None where they can."""
        return why_unfused(self.lm)

    @cached_property
    def fingerprint(self) -> str:
        """Of the language model."""
        return fingerprint_of(self._original)

    @cached_property
    def reward_fingerprint(self) -> str:
        """Of the reward models and how they are used."""
        parts = zip(self.rewarder.described, self.rewarder.parts, strict=True)
        return reward_fingerprint((described, part.loaded) for described, part in parts)

    def check_ids(self, name: str, ids: Sequence[int]) -> None:
        """Refuse what is no token id of the language model."""
        size = vocabulary(self.lm)
        wrong = next((i for i in ids if not 0 <= i < size), None)
        if wrong is not None:
            raise ValueError(f"{name} {shown(wrong)} is outside the vocabulary, expected 0 to {size - 1}")
