"""What a scorer is made of, beside its reward model: where it scores, and how a model reads text."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stars_kernels.hf.cache.buffers import Buffers
from stars_kernels.hf.cache.hidden import HiddenStates
from stars_kernels.hf.modes import CallersMode
from stars_kernels.hf.scoring.chunks import Chunks
from stars_kernels.hf.text.templates import Template


@dataclass(frozen=True)
class Workplace:
    """Where a scorer works.

    device: where rewards are wanted. hidden: the language model's hidden states, where they are kept. mode: what the
    user's functions are called in. buffers: where a cache takes its memory from, and leaves it.
    """

    device: torch.device
    hidden: HiddenStates | None = None
    mode: CallersMode = field(default_factory=CallersMode)
    buffers: Buffers = field(default_factory=Buffers)


@dataclass(frozen=True)
class TextModel:
    """A reward model that reads text.

    model: in eval mode; of a decoder, a view. label: the output that is the reward. tokenizer: its own, or one of the
    same ids. template: see `RewardModel`. chunks: bounds its forwards.
    """

    model: PreTrainedModel
    label: int
    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    chunks: Chunks
