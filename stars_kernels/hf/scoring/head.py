"""A head of the user's on a reward model's backbone: any module, and one that weighs objectives by the prompt."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stars_kernels.hf.loading.heads import Gated, read_head
from stars_kernels.hf.loading.language_model import ModelOrPath, name_of
from stars_kernels.hf.modes import without_autocast
from stars_kernels.hf.scoring.classifier import Output, linear_output
from stars_kernels.hf.scoring.reader import Values
from stars_kernels.hf.scoring.text import TextClassifierScorer
from stars_kernels.hf.scoring.workplace import TextModel, Workplace
from stars_kernels.hf.text.templates import TextPrompt
from stars_kernels.hf.view.layout import text_config
from stars_kernels.hf.view.rewrites.matching import is_plain


class GatedHead(Gated):
    """A head that weighs several objectives by what it makes of the prompt.

    The reward is the sum over k of gate(state at the prompt's end)[k] * objectives(state at the text's end)[k].
    """

    def __init__(self, objectives: nn.Module, gate: nn.Module, prompt_end: str) -> None:
        """objectives, gate: hidden states [R, D] -> [R, K].

        prompt_end: the text that closes the prompt in what the reward model reads; the gate's state is that of the
            first token of the last place where it stands.
        """
        super().__init__()
        if not isinstance(prompt_end, str) or not prompt_end:
            raise TypeError(f"prompt_end is {prompt_end!r}, expected a non-empty string")
        self.objectives, self.gate, self.prompt_end = objectives, gate, prompt_end


def head_of(model: ModelOrPath, head: nn.Module | str | tuple[str, nn.Module]) -> nn.Module:
    """Return the head as a module, read from the checkpoint where it lies there."""
    if isinstance(head, nn.Module):
        return head
    prefix, module = head if isinstance(head, tuple) else (head, None)
    if isinstance(model, str | os.PathLike):
        return read_head(os.path.expanduser(model), prefix, module)
    found = dict(model.named_modules()).get(prefix)
    if module is not None or found is None:
        raise ValueError(
            f"head is {prefix!r}, but reward_model {name_of(model)} is in memory and has {_children(model)}; expected "
            "one of these, or a module"
        )
    return found


def _children(model: nn.Module) -> str:
    return ", ".join(name for name, _ in model.named_children())


def head_values(head: nn.Module) -> Values:
    """All outputs of a head for every token: hidden [..., D] -> [..., K] float64, computed in the head's own dtype."""
    like = next((p for p in head.parameters() if p.is_floating_point()), None)

    def values(hidden: Tensor) -> Tensor:
        states = hidden.flatten(0, -2)  # [N, D]
        found = head(states if like is None else states.to(like.device, like.dtype))
        return found.double().view(*hidden.shape[:-1], -1)

    return values


def output_of(head: nn.Module, label: int) -> Output:
    """One output of a head at one token of each row: hidden [R, S, D], last [R] -> [R] float64."""
    if is_plain(head, nn.Linear):
        return linear_output(head, label)
    values = head_values(head)

    def output(hidden: Tensor, last: Tensor) -> Tensor:
        rows = torch.arange(len(last), device=hidden.device)
        return values(hidden[rows, last.to(hidden.device)])[:, label]

    return output


@torch.inference_mode()
@without_autocast()
def outputs_of(head: nn.Module, backbone: PreTrainedModel) -> int:
    """Return how many outputs a head has, by a trial call; a ValueError where it is no head of this backbone."""
    size = text_config(backbone).hidden_size
    expected = f"expected a module [R, {size}] -> [R, 1], or [R, K] with label="
    like = next((p for p in head.parameters() if p.is_floating_point()), None)
    states = torch.zeros(2, size, dtype=backbone.dtype if like is None else like.dtype,
                         device=backbone.device if like is None else like.device)  # fmt: skip
    try:
        found = head(states)
    except Exception as error:  # whatever a module raises that is no head
        raise ValueError(
            f"head {type(head).__name__} failed in a trial call on hidden states [2, {size}]: "
            f"{type(error).__name__}: {error}; {expected}"
        ) from error
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != 2:
        kind = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"head {type(head).__name__} returned {kind} for 2 hidden states; {expected}")
    return found.shape[1]


class GatedScorer(TextClassifierScorer):
    """The reward of a `GatedHead`; it reads text, in which the prompt's end can be told."""

    def __init__(self, text_model: TextModel, head: Gated, place: Workplace) -> None:
        super().__init__(text_model, head_values(head), place)
        self.prompt_end = head.prompt_end
        self.mark = list(self.tokenizer(head.prompt_end, add_special_tokens=False)["input_ids"])

    def reward(self, ids: list[int], values: list[Any]) -> float:
        last, size = values[-1], len(values[-1]) // 2
        gate = values[self._gate_at(ids)][size:]
        return math.fsum(weight * objective for weight, objective in zip(gate, last[:size], strict=True))

    def prepare(self, prompt: TextPrompt, answer: str) -> list[int]:
        ids = super().prepare(prompt, answer)
        self._gate_at(ids)
        return ids

    def _gate_at(self, ids: list[int]) -> int:
        """Return where the prompt's end begins for the last time."""
        size = len(self.mark)
        for at in range(len(ids) - size, -1, -1):
            if ids[at : at + size] == self.mark:
                return at
        raise ValueError(
            f"the text for the reward model has no {self.prompt_end!r}, expected the prompt_end at which its gate reads"
        )
