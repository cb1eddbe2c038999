"""Several reward models as one: the weighted sum of their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from stars_kernels.decoder.protocols import (
    Admission,
    Commit,
    QueueingScorer,
    Room,
    Rows,
    Scorer,
    Scores,
    Settle,
    together,
)


class SumScorer:
    """Every part reads every row; each part's rewards are on its own scale, the sum is what the rule sees."""

    def __init__(self, parts: Sequence[tuple[Scorer, float]]) -> None:
        """parts: scorers and their weights."""
        self.parts = parts

    def reserve(self, room: Room) -> None:
        for part, _ in self.parts:
            part.reserve(room)

    def admit(self, admissions: Sequence[Admission]) -> Scores:
        return self._sum([part.admit(admissions) for part, _ in self.parts])

    def open(self, rows: Rows, tokens: Tensor, lengths: Tensor) -> None:
        for part, _ in self.parts:
            part.open(rows, tokens, lengths)

    def score(self, wave: Sequence[int]) -> Scores:
        return self._sum([part.score(wave) for part, _ in self.parts])

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All that a commit reads and writes; only where the parts tell it."""
        return [tensor for part, _ in self.parts for tensor in cast(QueueingScorer, part).tensors]

    def commit(self, commit: Commit) -> Settle:
        return together([part.commit(commit) for part, _ in self.parts])

    def release(self) -> None:
        for part, _ in self.parts:
            part.release()

    def close(self) -> None:
        for part, _ in self.parts:
            part.close()

    def _sum(self, scores: list[Scores]) -> Scores:
        weights = [weight for _, weight in self.parts]
        home = scores[0].rewards.device
        rewards = torch.stack([weight * s.rewards.to(home) for weight, s in zip(weights, scores, strict=True)]).sum(0)
        read = [s.tokens.to(home) for s in scores if s.tokens is not None]
        errors: dict[int, Exception] = {}
        for s in reversed(scores):  # of a row with several errors, the first part's
            errors |= s.errors
        return Scores(rewards, torch.stack(read).sum(0) if read else None, errors)
