"""What a scorer is made of, beside its reward model: where it scores, and how a model reads text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stars_kernels.hf.cache.buffers import Buffers
from stars_kernels.hf.cache.hidden import HiddenStates
from stars_kernels.hf.modes import CallersMode
from stars_kernels.hf.proposing.graphs import Graphs
from stars_kernels.hf.scoring.chunks import Chunks
from stars_kernels.hf.text.templates import Template
from stars_kernels.hf.view.layout import layout_of


@dataclass(frozen=True)
class Workplace:
    """Where a scorer works.

    device: where rewards are wanted. hidden: the language model's hidden states, where they are kept. mode: what the
    user's functions are called in. buffers: where a cache takes its memory from, and leaves it. graphs: what captures
    the reward model's passes; None = there are no graphs.
    """

    device: torch.device
    hidden: HiddenStates | None = None
    mode: CallersMode = field(default_factory=CallersMode)
    buffers: Buffers = field(default_factory=Buffers)
    graphs: Graphs | None = None

    def part(self, index: int) -> Workplace:
        """Return the place of one of several reward models."""
        graphs = None if self.graphs is None else self.graphs.part(index)
        return replace(self, buffers=self.buffers.part(index), graphs=graphs)

    def graphs_for(self, model: PreTrainedModel) -> Graphs | None:
        """Return what captures the passes of a view; None where they are launched one operator after the other."""
        waits = model.device.type == "cuda" and model.dtype == torch.float64  # served by definitions, which wait
        if waits or model.device != self.device or layout_of(model).why_eager is not None:
            return None
        return self.graphs


@dataclass(frozen=True)
class TextModel:
    """A reward model that reads text.

    model: in eval mode; of a decoder, a view. tokenizer: its own, or one of the
    same ids. template: see `RewardModel`. chunks: bounds its forwards.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    chunks: Chunks
