"""transformers' logits processors and stopping criteria: what the engine does itself is lifted, the rest is asked.

Those asked are functions of the tokens: each sees what it would see in `model.generate`, the input as given there (left
padding included), the answer so far and, of a candidate, its own tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import (
    ClassifierFreeGuidanceLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import (
    ConfidenceCriteria,
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

from stars_kernels.decoder.memory import is_out_of_memory
from stars_kernels.decoder.protocols import Admission, Commit, Rows, Settle
from stars_kernels.hf.modes import CallersMode

Processor = Callable[[Tensor, Tensor], Tensor]
"""(input_ids [R, T], logits [R, V]) -> logits [R, V]"""
Criterion = Callable[..., Any]
"""(input_ids [1, T], scores=None) -> whether the answer ends with its last token"""

WARPERS: dict[type, str] = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
"""In the order in which `ops.segment_sample` applies them."""
NO_SAMPLING = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}
NO_FUNCTIONS = {
    UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale needs a second forward with a cache of its own",
    ClassifierFreeGuidanceLogitsProcessor: "guidance needs a second forward",
    SynthIDTextWatermarkLogitsProcessor: "it keeps a state from token to token",
    EncoderRepetitionPenaltyLogitsProcessor: "it belongs to models with an encoder",
    EncoderNoRepeatNGramLogitsProcessor: "it belongs to models with an encoder",
}
"""Processors that are no functions of one row's tokens."""


def lift_processors(processors: Iterable[Processor]) -> tuple[list[Processor], dict[str, Any]]:
    """Split processors into those to be asked and the `StarsConfig` settings of those that the sampling op applies.

    The op takes the longest tail of the list that stands in its own order, so that every one is applied once, and in
    the order of the list.
    """
    rest, settings, names = list(processors), dict(NO_SAMPLING), list(WARPERS.values())
    while rest and (name := _setting_of(rest[-1])) in names:
        settings[name] = getattr(rest.pop(), name)
        names = names[: names.index(name)]
    for processor in rest:
        for kind, why in NO_FUNCTIONS.items():
            if isinstance(processor, kind):
                raise ValueError(f"{type(processor).__name__} does not work with STARS decoding: {why}")
    return rest, settings


def _setting_of(processor: Processor) -> str | None:
    """Name the setting that a warper stands for; None where the op would do something else."""
    special = getattr(processor, "filter_value", -torch.inf) != -torch.inf
    special |= getattr(processor, "min_tokens_to_keep", 1) != 1
    return None if special else WARPERS.get(type(processor))


@dataclass
class Stops:
    """Stopping criteria, those known by what they stand for.

    max_length: counts the input's tokens too. deadline: of `time.time()`.
    """

    max_length: int = sys.maxsize
    deadline: float = math.inf
    eos: list[int] = field(default_factory=list)
    strings: list[str] = field(default_factory=list)
    rest: list[Criterion] = field(default_factory=list)


def lift_criteria(criteria: Iterable[Criterion]) -> Stops:
    stops = Stops()
    for criterion in criteria:
        if isinstance(criterion, ConfidenceCriteria):
            raise ValueError(
                "ConfidenceCriteria reads logits, expected stopping criteria that are functions of the tokens"
            )
        if type(criterion) is MaxTimeCriteria:
            stops.deadline = min(stops.deadline, criterion.initial_timestamp + criterion.max_time)
        elif type(criterion) is MaxLengthCriteria:
            stops.max_length = min(stops.max_length, criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            stops.eos += criterion.eos_token_id.tolist()
        elif type(criterion) is StopStringCriteria:
            stops.strings += criterion.stop_strings
        else:
            stops.rest.append(criterion)
    return stops


@dataclass(frozen=True)
class TokenHooks:
    """What is asked at every token of a call's answers; the default asks nothing.

    inputs: [P, T] int64, the prompts as processors and criteria see them; these are asked on its device, and in the
    mode in which this was made: they may compute gradients, on tensors of their own.
    """

    processors: Sequence[Processor] = ()
    criteria: Sequence[Criterion] = ()
    inputs: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    mode: CallersMode = field(default_factory=CallersMode)

    def find_stop(self, index: int, tokens: list[int], decided: int) -> int | None:
        """Return how many of the answer's `tokens` there are when a criterion first ends it; None where none does."""
        with self.mode.active():
            ids = torch.cat([self.inputs[index], self.inputs.new_tensor(tokens)])[None]
            length = self.inputs.shape[1]
            return next((n for n in range(decided + 1, len(tokens) + 1) if self._ends(ids[:, : length + n])), None)

    def _ends(self, ids: Tensor) -> bool:
        return any(bool(torch.as_tensor(criterion(ids, None)).all()) for criterion in self.criteria)

    def of_slots(self) -> SlotProcessors | None:
        """Make what asks the processors; None where there are none."""
        return SlotProcessors(self) if self.processors else None


def _for_prompt(processor: Processor, index: int) -> Processor:
    """Return a processor for rows that are all of one prompt: some count the rows of the whole call."""
    if type(processor) is RepetitionPenaltyLogitsProcessor and isinstance(processor.prompt_ignore_length, Tensor):
        return RepetitionPenaltyLogitsProcessor(processor.penalty, int(processor.prompt_ignore_length[index]))
    if type(processor) is PrefixConstrainedLogitsProcessor:
        allowed = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(index, ids), 1)
    return processor


class SlotProcessors:
    """The processors of each slot, and the tokens they read."""

    def __init__(self, hooks: TokenHooks) -> None:
        self.hooks, self.device, self.mode = hooks, hooks.inputs.device, hooks.mode
        self.close()

    def close(self) -> None:
        """Forget all."""
        self.processors: dict[int, list[Processor]] = {}
        self.decided: dict[int, Tensor] = {}
        """[T + decided] of each slot."""
        self.tail: dict[int, Tensor] = {}
        """The candidate to keep so far, behind the decided tokens."""
        self.errors: dict[int, Exception] = {}
        """The rows of the last round that a processor failed on."""

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Take the processors and the inputs of requests, each a `Request` of the call."""
        for admission in admissions:
            slot, index = admission.slot, admission.request.index
            self.processors[slot] = [_for_prompt(processor, index) for processor in self.hooks.processors]
            self.decided[slot], self.tail[slot] = self.hooks.inputs[index], self.hooks.inputs[index, :0]

    def forget(self) -> None:
        """Drop the errors, and what their frames hold."""
        self.errors = {}

    def __call__(self, rows: Rows, suffix: Tensor, logits: Tensor, ended: Tensor) -> Tensor:
        """Return the logits after the processors, [R, V] float32; NaN for a row that one fails on.

        suffix [R, n] int64: each row's tokens since its prefix; logits [R, V]: after them; ended [R] bool: the rows
        that nothing is asked about, as in `model.generate`, which would have stopped.
        """
        scores = logits.to(torch.float32, copy=True)
        done = ended.tolist()
        for slot, group in groupby((r for r in range(len(rows)) if not done[r]), key=rows.slots.__getitem__):
            index = list(group)
            scores[index] = self._process(slot, index, suffix[index], logits[index]).to(scores)
        return scores

    def _process(self, slot: int, index: list[int], suffix: Tensor, logits: Tensor) -> Tensor:
        """Ask for rows `index` of the round, all of one slot; where they fail together, for each alone."""
        try:
            with self.mode.active():
                return self._ask(slot, suffix, logits)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if len(index) == 1:
                self.errors[index[0]] = error
                return torch.full_like(logits, math.nan, dtype=torch.float32)
        rows = zip(index, suffix.split(1), logits.split(1), strict=True)
        return torch.cat([self._process(slot, [row], *one).to(logits.device) for row, *one in rows])

    def _ask(self, slot: int, suffix: Tensor, logits: Tensor) -> Tensor:
        known = self.decided[slot].expand(len(suffix), -1)
        ids = torch.cat([known, suffix.to(self.device)], dim=1)
        scores = logits.to(self.device, torch.float32, copy=True)  # as in `model.generate`: it may be written on
        for processor in self.processors[slot]:
            scores = processor(ids, scores)
            if scores.shape != logits.shape:
                name = type(processor).__name__
                raise ValueError(f"{name} returned logits of shape {list(scores.shape)}, expected {list(logits.shape)}")
        return scores

    def commit(self, commit: Commit, candidates: Tensor) -> Settle:
        """Append what was taken of `candidates` [R, S], the round's tokens; it shows once the result is called."""
        tail, decided = self.tail.copy(), self.decided.copy()
        for p, row, length, advance in commit.host:
            if row >= 0:
                tail[p] = candidates[row, :length].to(self.device)
            if advance:
                decided[p] = torch.cat([decided[p], tail[p]])

        def settle() -> None:
            self.tail, self.decided = tail, decided

        return settle
