"""Scorers of texts: the decided answers as tokens, and each row's prompt and answer as text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stars_kernels.decoder.protocols import Admission, Commit, Room, Rows, Scores, Settle, together
from stars_kernels.decoder.transfer import to_host
from stars_kernels.hf.scoring.classifier import Output
from stars_kernels.hf.scoring.reader import RowReader, Values
from stars_kernels.hf.scoring.workplace import TextModel, Workplace
from stars_kernels.hf.text.templates import TextPrompt, whole_ids
from stars_kernels.hf.view.layout import context_limit

Input = TypeVar("Input")


class TextScorer(ABC, Generic[Input]):
    """Scores whole texts. A row that cannot be prepared has no reward, and the others go on."""

    def __init__(self, place: Workplace) -> None:
        self.device = place.device

    def reserve(self, room: Room) -> None:
        self.prompts: dict[int, TextPrompt] = {}
        self.decided: dict[int, list[int]] = {}
        self.tail: dict[int, list[int]] = {}
        self.rows: list[list[int]] = []

    def admit(self, admissions: Sequence[Admission]) -> Scores:
        """Each is of a `Request`."""
        for a in admissions:
            self.prompts[a.slot], self.decided[a.slot], self.tail[a.slot] = a.request.text, [], []
        self._open([a.slot for a in admissions], [[] for _ in admissions])
        return self.score(range(len(admissions)))

    def open(self, rows: Rows, tokens: Tensor, lengths: Tensor) -> None:
        self.rows = [t[:n] for t, n in zip(*to_host((tokens, lengths)), strict=True)]
        self._open(rows.slots, [self.decided[p] + c for p, c in zip(rows.slots, self.rows, strict=True)])

    def _open(self, slots: Sequence[int], answers: Sequence[list[int]]) -> None:
        """Prepare rows; answers: the tokens of each row's whole answer."""
        inputs: dict[int, Input] = {}
        self.unprepared: dict[int, Exception] = {}
        for row, (p, ids) in enumerate(zip(slots, answers, strict=True)):
            try:
                inputs[row] = self.prepare(self.prompts[p], self.prompts[p].answer(ids))
            except Exception as error:  # a template's and a tokenizer's errors are of many kinds
                self.unprepared[row] = error
        self.number = {row: number for number, row in enumerate(inputs)}
        """Of each row that could be prepared, its number among these."""
        self.take([slots[row] for row in inputs], list(inputs.values()))

    def score(self, wave: Sequence[int]) -> Scores:
        home = [place for place, row in enumerate(wave) if row in self.number]
        found = Scores(torch.empty(0, dtype=torch.float64, device=self.device))
        if home:
            found = self.read([self.number[wave[place]] for place in home])
        if len(home) == len(wave):
            return found
        errors = {place: self.unprepared[row] for place, row in enumerate(wave) if row in self.unprepared}
        rewards = torch.full((len(wave),), torch.nan, dtype=torch.float64, device=self.device)
        rewards[home] = found.rewards.to(self.device)
        tokens = None
        if found.tokens is not None:
            tokens = torch.zeros(len(wave), dtype=torch.int64, device=found.tokens.device)
            tokens[home] = found.tokens
        return Scores(rewards, tokens, errors | {home[row]: error for row, error in found.errors.items()})

    def commit(self, commit: Commit) -> Settle:
        def settle() -> None:
            for p, row, _, advance in commit.host:
                if row >= 0:
                    self.tail[p] = self.rows[row]
                if advance:
                    self.decided[p] += self.tail[p]

        return settle

    def release(self) -> None:
        """It holds no rows on a device."""

    def close(self) -> None:
        """It holds nothing on a device."""

    @abstractmethod
    def prepare(self, prompt: TextPrompt, answer: str) -> Input:
        """What is to be read of one row; may raise, which fails this row alone."""

    def take(self, slots: list[int], inputs: list[Input]) -> None:
        """Keep the prepared rows of a round, each with its slot, for `read`."""
        self.inputs = inputs

    @abstractmethod
    def read(self, numbers: list[int]) -> Scores:
        """The rewards of these of the rows that were taken; each is read once, at most."""


class ReaderScorer(TextScorer[Input]):
    """Scores texts with a decoder, whose reader keeps what the next rows will share with the chosen one."""

    def __init__(self, place: Workplace, reader: RowReader) -> None:
        super().__init__(place)
        self.reader = reader

    def reserve(self, room: Room) -> None:
        super().reserve(room)
        self.reader.reserve(room)

    def admit(self, admissions: Sequence[Admission]) -> Scores:
        self.reader.admit([a.slot for a in admissions])
        scores = super().admit(admissions)
        self.reader.keep(range(len(self.number)))()  # the empty answers, one per slot
        return scores

    def commit(self, commit: Commit) -> Settle:
        chosen = [row for _, row, _, advance in commit.host if advance and row >= 0]
        return together([super().commit(commit), self.reader.keep([self.number[row] for row in chosen])])

    def release(self) -> None:
        self.reader.release()

    def close(self) -> None:
        self.reader.close()


class TextClassifierScorer(ReaderScorer[list[int]]):
    """A decoder of another tokenizer or template; its reward is read at the text's last token."""

    def __init__(self, text_model: TextModel, values: Values, place: Workplace) -> None:
        """values: of each token; that of the last one is the reward."""
        super().__init__(place, row_reader(text_model, place, values))
        self.tokenizer, self.limit = text_model.tokenizer, context_limit(text_model.model)
        self.template = place.mode.bound(text_model.template)

    def prepare(self, prompt: TextPrompt, answer: str) -> list[int]:
        ids = whole_ids(self.tokenizer, self.template, prompt, answer)
        check_length(len(ids), self.limit)
        return ids

    def take(self, slots: list[int], inputs: list[list[int]]) -> None:
        super().take(slots, inputs)
        self.reader.open(slots, inputs)

    def read(self, numbers: list[int]) -> Scores:
        values, counts = self.reader.read(numbers)
        rewards = [self.reward(self.inputs[number], row) for number, row in zip(numbers, values, strict=True)]
        return Scores(torch.tensor(rewards, dtype=torch.float64, device=self.device), torch.tensor(counts))

    def reward(self, ids: list[int], values: list[Any]) -> float:
        """Return the reward of a row's tokens, whose values are given."""
        return float(values[-1])


def every_token(output: Output) -> Values:
    """A reward as the value of every token."""

    def values(hidden: Tensor) -> Tensor:
        every = hidden.flatten(0, -2)[:, None]  # [N, 1, D]: each token is the last of its own row
        return output(every, torch.zeros(len(every), dtype=torch.int64, device=every.device)).view(hidden.shape[:-1])

    return values


def row_reader(text_model: TextModel, place: Workplace, values: Values) -> RowReader:
    """Make the reader of a decoder."""
    backbone = cast(PreTrainedModel, text_model.model.base_model)
    return RowReader(backbone, values, text_model.chunks, place.buffers)


def check_length(count: int, limit: int) -> None:
    """Refuse a row that the reward model cannot read."""
    if count == 0:
        raise ValueError("prompt and answer have no tokens for the reward model, expected at least one")
    if count > limit:
        raise ValueError(
            f"prompt and answer are {count} of the reward model's tokens, more than its context limit of {limit}"
        )
