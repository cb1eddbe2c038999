"""Reward models as Scorers: a sequence classifier with a cache of its own, or any callable on texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stars_kernels import ops
from stars_kernels.decoder.protocols import Commit, Rows, Scores
from stars_kernels.hf.cache import open_cache
from stars_kernels.hf.proposer import packed_chunks

RewardFunction = Callable[[list[str], list[str]], Any]
"""rm(prompts, answers) -> one float each; answers come without prompt and special tokens."""


class WrongRewards(ValueError):
    """A reward function returned something that is not one float for each answer."""


class ClassifierScorer:
    """A causal sequence classifier that reads each accepted token once.

    The reward is the head's output at the LAST token of prompt + answer, an EOS included. (transformers reads it at the
    last token that is not the pad token: one earlier where an answer ends in EOS and pad is EOS.)
    """

    def __init__(self, model: PreTrainedModel, label: int) -> None:
        """model: a view with the stars attention; label: the output that is the reward."""
        self.backbone = cast(PreTrainedModel, model.base_model)
        self.weight = model.get_parameter("score.weight")[label]  # [D]
        self.device = model.device

    def begin(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, segment_size: int) -> Scores:
        capacities = [len(prompt) + max_new_tokens for prompt in prompts]
        self.cache = open_cache(self.backbone, capacities, segment_size)
        rewards = torch.empty(len(prompts), dtype=torch.float64, device=self.device)
        for chunk in packed_chunks(prompts):
            last = torch.tensor(chunk.last, dtype=torch.int64, device=self.device)
            with self.cache.prefill(chunk.owners, chunk.counts) as inputs:
                hidden = self._hidden(torch.tensor([chunk.ids], device=self.device), inputs)
            rewards[chunk.finished] = ops.reward_head(hidden.expand(len(last), -1, -1), last, self.weight).double()
        return Scores(rewards, torch.tensor([len(prompt) for prompt in prompts]))

    def score(self, rows: Rows, tokens: Tensor, lengths: Tensor) -> Scores:
        self.cache.fork(rows.prompt)
        with self.cache.extend(tokens.shape[1], lengths) as inputs:
            hidden = self._hidden(tokens, inputs)
        return Scores(ops.reward_head(hidden, lengths - 1, self.weight).double(), lengths)

    def commit(self, commit: Commit) -> None:
        self.cache.commit(commit.prompt, commit.row, commit.length, commit.advance)

    def _hidden(self, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        return self.backbone(input_ids=ids, **inputs).last_hidden_state


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
