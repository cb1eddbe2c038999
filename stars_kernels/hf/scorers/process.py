"""A process reward model: a causal token classifier that scores the steps of an answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stars_kernels.decoder.protocols import Scores
from stars_kernels.hf.models import context_limit
from stars_kernels.hf.scorers.chunks import Chunks
from stars_kernels.hf.scorers.reader import RowReader
from stars_kernels.hf.scorers.text import ReaderScorer, check_length
from stars_kernels.hf.texts import TextPrompt, text_ids, turn_header

Reduce = Literal["min", "mean", "prod", "last"]
REDUCE: dict[str, Callable[[list[float]], float]] = {
    "min": min,
    "mean": lambda steps: math.fsum(steps) / len(steps),
    "prod": math.prod,
    "last": lambda steps: steps[-1],
}


class ProcessScorer(ReaderScorer[tuple[list[int], list[int]]]):
    """The probability of one label at the end of each step, reduced to one reward.

    Each step is tokenised alone and closed with the separator's tokens, the unfinished last one too, as such models are
    trained: prompt, step, separator, step, separator, ... A step's score is read at its separator's last token. Empty
    steps are left out, but the empty answer is one empty step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        label: int,
        tokenizer: PreTrainedTokenizerBase,
        step: str,
        reduce: Reduce,
        prompts: Sequence[TextPrompt],
        device: torch.device,
        chunks: Chunks,
    ) -> None:
        """model: a view with the stars attention; label: whose probability is a step's score; step: the separator."""

        score = model.get_submodule("score")

        def head(hidden: Tensor) -> Tensor:
            return score(hidden).double().softmax(dim=-1)[..., label]

        super().__init__(prompts, device, RowReader(cast(PreTrainedModel, model.base_model), head, chunks))
        self.tokenizer, self.step, self.reduce = tokenizer, step, REDUCE[reduce]
        self.separator = self._plain_ids(step)
        self.limit = context_limit(model)

    def prepare(self, prompt: TextPrompt, answer: str) -> tuple[list[int], list[int]]:
        """Token ids, and where in them the steps end."""
        ids, ends = self._prompt_ids(prompt), []
        for step in [step for step in answer.split(self.step) if step] or [""]:
            ids = ids + self._plain_ids(step) + self.separator
            ends.append(len(ids) - 1)
        check_length(len(ids), self.limit)
        return ids, ends

    def read(self, owners: list[int], inputs: list[tuple[list[int], list[int]]]) -> Scores:
        values, counts = self.reader.read(owners, [ids for ids, _ in inputs])
        rewards = [self.reduce([row[end] for end in ends]) for row, (_, ends) in zip(values, inputs, strict=True)]
        return Scores(torch.tensor(rewards, dtype=torch.float64, device=self.device), torch.tensor(counts))

    def _prompt_ids(self, prompt: TextPrompt) -> list[int]:
        """By the model's own chat template, up to the assistant's words, where there are messages and a template."""
        if prompt.messages is None or not self.tokenizer.chat_template:
            return text_ids(self.tokenizer, prompt.text)
        return self._plain_ids(turn_header(self.tokenizer, prompt.messages))

    def _plain_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
