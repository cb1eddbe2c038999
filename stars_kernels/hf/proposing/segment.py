"""A segment of all rows on its way: what was drawn so far, and how the next token is drawn. Nothing waits for a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stars_kernels import ops
from stars_kernels.decoder.ends import is_in
from stars_kernels.decoder.protocols import Rows
from stars_kernels.decoder.rules import Plan
from stars_kernels.hf.cache.buffers import Buffers
from stars_kernels.hf.proposing.draws import entropy, likeliest

Step = int | Tensor
"""The number of a token in its segment; where a CUDA graph is to serve every step, a tensor [1] that it reads."""


def column(step: Step) -> slice | Tensor:
    """Index the column of a step, in what has one for each token of a segment."""
    return slice(step, step + 1) if isinstance(step, int) else step


@dataclass
class Segment:
    """What the rows have drawn; T is plan.size at least."""

    rows: Rows
    tokens: Tensor  # [R, T] int64
    logprobs: Tensor  # [R, T] float64
    entropies: Tensor  # [R, T] float64, NaN where it was not asked for
    ended: Tensor  # [R] bool: nothing behind it matters
    eos: Tensor  # [E] int64 the tokens that end a row
    step: Tensor  # [1] int64 the token that a graph reads next

    @staticmethod
    def begin(rows: Rows, size: int, eos: Tensor, buffers: Buffers | None = None) -> Segment:
        """Begin a segment of up to `size` tokens; in buffers, where given, it stays where graphs have found it."""
        count, device = len(rows), rows.slot.device

        def take(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            if buffers is None:
                return torch.empty(shape, dtype=dtype, device=device)
            return buffers.take(("segment", name), shape, dtype, device)

        tokens, logprobs, entropies = (
            take(name, (count, size), dtype)[:count]
            for name, dtype in (("tokens", torch.int64), ("logprobs", torch.float64), ("entropies", torch.float64))
        )
        entropies.fill_(torch.nan)
        ended = take("ended", (count,), torch.bool)[:count].zero_()
        step = take("step", (1,), torch.int64).zero_()
        if buffers is not None:
            columns = take("rows", (len(rows.columns), count), torch.int64)[:, :count]
            slot, attempt, key, position = columns.copy_(torch.stack(rows.columns))
            rows = Rows(rows.slots, slot, attempt, key, position)
            eos = take("eos", eos.shape, torch.int64)[: len(eos)].copy_(eos)
        return Segment(rows, tokens, logprobs, entropies, ended, eos, step)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.rows.columns, self.tokens, self.logprobs, self.entropies, self.ended, self.eos, self.step]


@dataclass(frozen=True)
class Draws:
    """How tokens are drawn: by the plan, with the keyword arguments of `ops.segment_sample`."""

    plan: Plan
    sampling: dict[str, Any]
    noise: int
    head: Tensor | None  # [V, D] the output layer, where all but the first tokens are drawn from hidden states

    @property
    def settings(self) -> tuple[object, ...]:
        """All that a draw is a function of, besides tensors and the plan's size."""
        plan, fused = self.plan, self.head is not None
        count = plan.attempts if plan.draw == "likeliest" else None
        return plan.draw, count, plan.entropy, fused, self.noise, *self.sampling.items()

    def draw(self, segment: Segment, step: Step, state: Tensor, source: Tensor | None = None) -> None:
        """Draw each row's token from logits [N, V], that of source[r] where N is not R, or from hidden states [R, D].

        Hidden states where there is a head, but for step 0.
        """
        rows, first = segment.rows, isinstance(step, int) and step == 0
        draws = (rows.key, rows.attempt, rows.position + step)
        if self.plan.draw == "likeliest":
            token, logprob = likeliest(state, source, rows.attempt, self.plan.attempts)
        elif self.head is None or first:
            token, logprob = ops.segment_sample(state, *draws, source=source, stream=self.noise, **self.sampling)
        else:
            temperature = self.sampling["temperature"]
            token, logprob = ops.lm_head_sample(state, self.head, *draws, temperature=temperature, stream=self.noise)
        here = column(step)
        segment.tokens[:, here], segment.logprobs[:, here] = token[:, None], logprob[:, None].double()

    def measure(self, segment: Segment, step: Step, logits: Tensor) -> None:
        """Where entropy has a bound, end the rows whose next token's reaches it; logits: [R, V] that token's."""
        if self.plan.entropy is None:
            return
        found = entropy(logits)
        segment.entropies[:, column(step)] = found[:, None]
        segment.ended |= found >= self.plan.entropy

    def end(self, segment: Segment, step: Step) -> None:
        """End the rows whose token is one of `eos`, or could not be drawn."""
        token = segment.tokens[:, column(step)]
        segment.ended |= (is_in(token, segment.eos) | (token < 0))[:, 0]
