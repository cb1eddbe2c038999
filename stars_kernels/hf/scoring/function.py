"""Any function of texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stars_kernels.decoder.memory import is_out_of_memory
from stars_kernels.decoder.protocols import Scores
from stars_kernels.hf.scoring.text import TextScorer
from stars_kernels.hf.scoring.workplace import Workplace
from stars_kernels.hf.text.templates import TextPrompt

RewardFunction = Callable[[list[str], list[str]], Any]
"""reward_model(prompts, answers) -> one float each; answers come without special tokens."""


class WrongRewards(ValueError):
    """A reward function returned something that is not one float for each answer."""


class CallableScorer(TextScorer[tuple[str, str]]):
    """A function of texts; it sees the whole answer each time. Where it raises for one row, the others go on."""

    def __init__(self, function: RewardFunction, place: Workplace) -> None:
        super().__init__(place)
        self.function = place.mode.bound(function)

    def prepare(self, prompt: TextPrompt, answer: str) -> tuple[str, str]:
        return prompt.text, answer

    def read(self, numbers: list[int]) -> Scores:
        """One call for all rows; where it raises, one call a row, so that only the rows at fault have no reward.

        Rewards of the wrong number or kind are a mistake in the function, and no row's fault: it is not asked again.
        """
        inputs = [self.inputs[number] for number in numbers]
        try:
            return Scores(self._rewards(inputs).to(self.device))
        except WrongRewards as error:
            errors: dict[int, Exception] = dict.fromkeys(range(len(inputs)), error)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            errors = {}
        rewards = torch.full((len(inputs),), torch.nan, dtype=torch.float64)
        for row, one in enumerate(inputs if not errors else ()):
            try:
                rewards[row] = self._rewards([one])[0]
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                errors[row] = error
        return Scores(rewards.to(self.device), errors=errors)

    def _rewards(self, inputs: list[tuple[str, str]]) -> Tensor:
        returned = self.function([prompt for prompt, _ in inputs], [answer for _, answer in inputs])
        expected = f"expected floats of shape [{len(inputs)}], one for each answer"
        try:
            values = torch.as_tensor(returned, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise WrongRewards(f"the reward function returned {_shorten(returned)}, {expected}") from error
        if values.shape != (len(inputs),):
            raise WrongRewards(f"the reward function returned shape {list(values.shape)}, {expected}")
        return values


def _shorten(value: object) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) < 200 else text[:200] + "..."
