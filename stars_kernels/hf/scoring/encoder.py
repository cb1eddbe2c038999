"""An encoder classifier (BERT and its like), which reads prompt and answer anew each time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stars_kernels.decoder.protocols import Scores
from stars_kernels.hf.scoring.text import TextScorer, check_length
from stars_kernels.hf.scoring.workplace import TextModel, Workplace
from stars_kernels.hf.text.templates import TextPrompt, filled

Encoding = Mapping[str, list[int]]
"""What the tokenizer returns for one text: input_ids, attention_mask, maybe token_type_ids."""


class EncoderScorer(TextScorer[Encoding]):
    """The reward is the raw output (no sigmoid, no softmax) for the pair (prompt, answer), or for one text by template.

    Attention looks both ways, so nothing that was read can be kept: rows are padded and read in bounded chunks.
    """

    def __init__(self, text_model: TextModel, label: int, place: Workplace) -> None:
        """label: the output that is the reward."""
        super().__init__(place)
        self.model, self.label, self.chunks = text_model.model, label, text_model.chunks
        self.tokenizer, self.template = text_model.tokenizer, place.mode.bound(text_model.template)
        self.limit = encoder_limit(self.model, self.tokenizer)

    def prepare(self, prompt: TextPrompt, answer: str) -> Encoding:
        if self.template is None:
            encoding = dict(self.tokenizer(prompt.text, answer))
        else:
            encoding = dict(self.tokenizer(filled(self.template, prompt, answer)))
        check_length(len(encoding["input_ids"]), self.limit)
        return encoding

    def read(self, numbers: list[int]) -> Scores:
        inputs = [self.inputs[number] for number in numbers]
        counts = [len(encoding["input_ids"]) for encoding in inputs]

        def forward(chunk: slice) -> Tensor:
            longest = max(counts[chunk])

            def padded(rows: list[list[int]]) -> Tensor:  # [r, longest]; padding is masked, so its ids do not matter
                return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.model.device)

            batch = {name: padded([encoding[name] for encoding in inputs[chunk]]) for name in inputs[0]}
            batch["attention_mask"] = padded([[1] * count for count in counts[chunk]])
            return self.model(**batch).logits[:, self.label].double()

        rewards = torch.cat(self.chunks.run(counts, forward))
        return Scores(rewards.to(self.device), torch.tensor(counts))


def encoder_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens it can read. (RoBERTa's positions begin behind its padding index.)"""
    reserved = 0
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            reserved = module.padding_idx + 1
    return min(int(model.config.max_position_embeddings) - reserved, tokenizer.model_max_length)
