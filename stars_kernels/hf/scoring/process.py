"""A process reward model: a causal token classifier that scores the steps of an answer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from stars_kernels.decoder.protocols import Scores
from stars_kernels.hf.scoring.reader import Values
from stars_kernels.hf.scoring.text import ReaderScorer, check_length, row_reader
from stars_kernels.hf.scoring.workplace import TextModel, Workplace
from stars_kernels.hf.text.prompts import text_ids
from stars_kernels.hf.text.templates import TextPrompt, filled, turn_header
from stars_kernels.hf.view.layout import context_limit

KNOWN_TEXTS = 4096
"""Steps and prompts whose tokens are kept."""
Reduce = Literal["min", "mean", "prod", "last"]
REDUCE: dict[str, Callable[[list[float]], float]] = {
    "min": min,
    "mean": lambda steps: math.fsum(steps) / len(steps),
    "prod": math.prod,
    "last": lambda steps: steps[-1],
}


def probability(outputs: Values, label: int) -> Values:
    """The softmax probability of one of several outputs."""
    return lambda hidden: outputs(hidden).double().softmax(dim=-1)[..., label]


class ProcessScorer(ReaderScorer[tuple[list[int], list[int]]]):
    """The probability of one label at the end of each step, reduced to one reward.

    Each step is tokenised alone and closed with the separator's tokens, the unfinished last one too, as such models are
    trained: prompt, step, separator, step, separator, ... A step's score is read at its separator's last token. Empty
    steps are left out, but the empty answer is one empty step.
    """

    def __init__(self, text_model: TextModel, values: Values, step: str, reduce: Reduce, place: Workplace) -> None:
        """values: of each token, its score where a step ends there. step: the separator. (No template is asked.)"""
        super().__init__(place, row_reader(text_model, place, values))
        tokenizer = text_model.tokenizer
        self.step, self.reduce, self.limit = step, REDUCE[reduce], context_limit(text_model.model)

        @functools.lru_cache(KNOWN_TEXTS)  # a row has its prompt and nearly all of its steps in common with others
        def plain_ids(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        @functools.lru_cache(KNOWN_TEXTS)
        def prompt_ids(prompt: TextPrompt) -> list[int]:
            if prompt.messages is None or not tokenizer.chat_template:
                return text_ids(tokenizer, prompt.text)
            return plain_ids(turn_header(tokenizer, prompt.messages))

        self._plain_ids, self._prompt_ids = plain_ids, prompt_ids

    def prepare(self, prompt: TextPrompt, answer: str) -> tuple[list[int], list[int]]:
        """Token ids, and where in them the steps end."""
        ids, ends, separator = [*self._prompt_ids(prompt)], [], self._plain_ids(self.step)
        for step in self._steps(answer):
            ids += [*self._plain_ids(step), *separator]
            ends.append(len(ids) - 1)
        check_length(len(ids), self.limit)
        return ids, ends

    def _steps(self, answer: str) -> list[str]:
        return [step for step in answer.split(self.step) if step] or [""]

    def take(self, slots: list[int], inputs: list[tuple[list[int], list[int]]]) -> None:
        super().take(slots, inputs)
        self.reader.open(slots, [ids for ids, _ in inputs])

    def read(self, numbers: list[int]) -> Scores:
        values, counts = self.reader.read(numbers)
        ends = [self.inputs[number][1] for number in numbers]
        rewards = [self.reduce([row[end] for end in mine]) for row, mine in zip(values, ends, strict=True)]
        return Scores(torch.tensor(rewards, dtype=torch.float64, device=self.device), torch.tensor(counts))


@dataclass(frozen=True)
class Marks:
    """mark: closes a step; its score is read at the last token. between: stands behind a mark, before the next step."""

    mark: str
    between: str


class MarkedScorer(ProcessScorer):
    """As `ProcessScorer`, of one text in which each step is closed by a mark, tokenised as a whole.

    The text before the first step is the template's with an empty answer, else the chat template's or the prompt's.
    """

    def __init__(
        self, text_model: TextModel, values: Values, step: str, reduce: Reduce, marks: Marks, place: Workplace
    ) -> None:
        super().__init__(text_model, values, step, reduce, place)
        self.tokenizer, self.marks = text_model.tokenizer, marks
        self.template = place.mode.bound(text_model.template)
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"the reward model's tokenizer is a {type(self.tokenizer).__name__}, which does not tell where its "
                "tokens lie in a text; expected a fast one with mark="
            )

    def prepare(self, prompt: TextPrompt, answer: str) -> tuple[list[int], list[int]]:
        text, ends, chat = self._opening(prompt), list[int](), self._reads_chat(prompt)
        for i, step in enumerate(self._steps(answer)):
            text += (self.marks.between if i else "") + step + self.marks.mark
            ends.append(len(text))
        bos = self.tokenizer.bos_token
        special = not chat and not (bos and text.startswith(bos))
        found = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ending = {end: at for at, (start, end) in enumerate(found["offset_mapping"]) if start < end}
        check_length(len(found["input_ids"]), self.limit)
        for end in ends:
            if end not in ending:
                raise ValueError(
                    f"no token ends where the mark {self.marks.mark!r} does, in {text[end - 20 : end + 20]!r}; "
                    "expected a mark that the reward model's tokenizer keeps apart from the text behind it"
                )
        return list(found["input_ids"]), [ending[end] for end in ends]

    def _reads_chat(self, prompt: TextPrompt) -> bool:
        return self.template is None and prompt.messages is not None and bool(self.tokenizer.chat_template)

    def _opening(self, prompt: TextPrompt) -> str:
        """Return the text before the first step."""
        if self._reads_chat(prompt):
            assert prompt.messages is not None
            return turn_header(self.tokenizer, prompt.messages)
        return prompt.text if self.template is None else filled(self.template, prompt, "")
