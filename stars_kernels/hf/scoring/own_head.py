"""A head on the language model's own hidden states: a reward without a second model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stars_kernels import ops
from stars_kernels.decoder.protocols import Admission, Commit, Room, Rows, Scores, Settle
from stars_kernels.decoder.transfer import rows_of, to_device
from stars_kernels.hf.cache.hidden import HiddenStates
from stars_kernels.hf.view.rewrites.matching import is_plain


class OwnHeadScorer:
    """The head's output on the hidden state of the LAST token of prompt + answer, an EOS included.

    Nothing is read for it: the proposer has the hidden states already, so `Scores.tokens` stays empty.
    """

    def __init__(self, head: nn.Module, hidden: HiddenStates) -> None:
        """head: hidden states [R, D] -> rewards [R] or [R, 1], called in its own dtype. hidden: as the proposer's."""
        self.head, self.hidden = head, hidden

    def reserve(self, room: Room) -> None:
        """Take no memory: the hidden states are the proposer's."""

    def admit(self, admissions: Sequence[Admission]) -> Scores:
        (slot,) = to_device([[a.slot for a in admissions]], self.hidden.prompts.device)
        return Scores(head_rewards(self.head, self.hidden.prompts[slot][:, None], torch.zeros_like(slot)))

    def open(self, rows: Rows, tokens: Tensor, lengths: Tensor) -> None:
        self.last = lengths - 1

    def score(self, wave: Sequence[int]) -> Scores:
        states = self.hidden.rows[: len(self.last)]
        return Scores(head_rewards(self.head, rows_of(states, wave), rows_of(self.last, wave)))

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Nothing: a commit is the proposer's."""
        return ()

    def commit(self, commit: Commit) -> Settle:
        """Nothing to write: what is kept of the rows is the proposer's."""
        return lambda: None

    def release(self) -> None:
        """It holds no rows of its own."""

    def close(self) -> None:
        """It holds no memory of its own: the hidden states are the proposer's."""


def head_rewards(head: nn.Module, states: Tensor, last: Tensor) -> Tensor:
    """Compute the head's output [R] float64 on states [R, T, D], at the tokens `last` [R]."""
    if is_plain(head, nn.Linear) and len(head.weight) == 1:
        return ops.reward_head(states, last, head.weight[0], bias=head.bias).double()
    states = states[torch.arange(len(last), device=last.device), last]  # [R, D]
    dtype = next((p.dtype for p in head.parameters() if p.is_floating_point()), states.dtype)
    rewards = head(states.to(dtype))
    if not isinstance(rewards, Tensor) or rewards.shape not in ((len(last),), (len(last), 1)):
        found = f"shape {list(rewards.shape)}" if isinstance(rewards, Tensor) else type(rewards).__name__
        raise ValueError(f"the head returned {found} for {len(last)} hidden states, expected [{len(last)}, 1]")
    return rewards.double().reshape(-1)
