"""Any function of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stars_kernels.decoder.protocols import Commit, Rows, Scores

RewardFunction = Callable[[list[str], list[str]], Any]
"""rm(prompts, answers) -> one float each; answers come without prompt and special tokens."""


class WrongRewards(ValueError):
    """A reward function returned something that is not one float for each answer."""


class CallableScorer:
    """A function of texts; it sees the whole answer each time. Where it raises for one row, the others go on."""

    def __init__(
        self,
        function: RewardFunction,
        prompts: Sequence[str],
        to_text: Callable[[list[int]], str],
        device: torch.device,
    ) -> None:
        """prompts: the text of each prompt of the batch. to_text: an answer's tokens as the text to be judged."""
        self.function, self.prompts, self.to_text, self.device = function, prompts, to_text, device

    def begin(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, segment_size: int) -> Scores:
        self.accepted: list[list[int]] = [[] for _ in prompts]
        self.tail: list[list[int]] = [[] for _ in prompts]
        return self._call(list(range(len(prompts))), [""] * len(prompts))

    def score(self, rows: Rows, tokens: Tensor, lengths: Tensor) -> Scores:
        owners = rows.prompt.tolist()
        self.candidates = [t[:n] for t, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        answers = [self.to_text(self.accepted[p] + c) for p, c in zip(owners, self.candidates, strict=True)]
        return self._call(owners, answers)

    def commit(self, commit: Commit) -> None:
        for p, row, advance in zip(commit.prompt.tolist(), commit.row.tolist(), commit.advance.tolist(), strict=True):
            if row >= 0:
                self.tail[p] = self.candidates[row]
            if advance:
                self.accepted[p] += self.tail[p]

    def release(self) -> None:
        """It holds no rows on a device."""

    def _call(self, owners: list[int], answers: list[str]) -> Scores:
        """One call for all rows; where it raises, one call a row, so that only the rows at fault have no reward.

        Rewards of the wrong number or kind are a mistake in the function, and no row's fault: it is not asked again.
        """
        rewards = torch.full((len(owners),), torch.nan, dtype=torch.float64)
        errors: dict[int, Exception] = {}
        try:
            rewards[:] = self._rewards(owners, answers)
        except WrongRewards as error:
            errors = dict.fromkeys(range(len(owners)), error)
        except Exception:
            for row, (owner, answer) in enumerate(zip(owners, answers, strict=True)):
                try:
                    rewards[row] = self._rewards([owner], [answer])[0]
                except Exception as error:
                    errors[row] = error
        return Scores(rewards.to(self.device), errors=errors)

    def _rewards(self, owners: list[int], answers: list[str]) -> Tensor:
        returned = self.function([self.prompts[p] for p in owners], list(answers))
        expected = f"expected floats of shape [{len(answers)}], one for each answer"
        try:
            values = torch.as_tensor(returned, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise WrongRewards(f"the reward function returned {_shorten(returned)}, {expected}") from error
        if values.shape != (len(answers),):
            raise WrongRewards(f"the reward function returned shape {list(values.shape)}, {expected}")
        return values


def _shorten(value: object) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) < 200 else text[:200] + "..."
