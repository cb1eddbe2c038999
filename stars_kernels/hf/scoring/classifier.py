"""A causal sequence classifier that shares the language model's token ids, with a cache of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stars_kernels import ops
from stars_kernels.decoder.protocols import Admission, Commit, Room, Rows, Scores, Settle
from stars_kernels.decoder.transfer import rows_of, to_device
from stars_kernels.hf.cache import close_cache_of, reserve_cache
from stars_kernels.hf.cache.buffers import Buffers
from stars_kernels.hf.cache.prefill import packed_chunks
from stars_kernels.hf.loading.language_model import score_head
from stars_kernels.hf.proposing.graphs import Graphs, bucket_of
from stars_kernels.hf.scoring.chunks import Chunks

Output = Callable[[Tensor, Tensor], Tensor]
"""A reward of hidden states: hidden [R, S, D] and each row's last token [R] -> [R] float64."""


class ClassifierScorer:
    """A causal sequence classifier that reads each decided token once; it may lie on another device than the rows.

    The reward is the head's output at the LAST token of prompt + answer, an EOS included. (transformers reads it at the
    last token that is not the pad token: one earlier where an answer ends in EOS and pad is EOS.)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        label: int | Output,
        chunks: Chunks | None = None,
        buffers: Buffers | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        """model: a view with the stars attention; label: the output of its head that is the reward, or what gives one.

        buffers: where its memory comes from and stays, as `graphs` do; None = memory of its own.
        graphs: runs the passes over candidates as CUDA graphs; None = eagerly.
        """
        self.buffers = Buffers() if buffers is None else buffers
        self.graphs = graphs
        self.backbone = cast(PreTrainedModel, model.base_model)
        self.head = label if callable(label) else reward_output(model, label)
        self.device = model.device
        self.chunks = chunks or Chunks()

    def reserve(self, room: Room) -> None:
        self.close()
        self.cache = reserve_cache(self.backbone, room.slots, room.tokens, room.segment, self.buffers)

    def admit(self, admissions: Sequence[Admission]) -> Scores:
        unread = self.cache.admit(admissions)
        rewards = []  # prompts end in the order in which they are read
        for chunk in packed_chunks(unread, self.cache):
            ids, last = to_device([chunk.ids, chunk.last], self.device)
            with self.cache.prefill(chunk.slots, chunk.counts) as inputs:
                hidden = self._hidden(ids[None], inputs)
            rewards.append(self.head(hidden.expand(len(last), -1, -1), last).to(self.device))
        return Scores(torch.cat(rewards), torch.tensor([len(unread[a.slot]) for a in admissions]))

    def open(self, rows: Rows, tokens: Tensor, lengths: Tensor) -> None:
        if self.graphs is not None and not rows.held:
            self.cache.make_room(len(rows) + len(rows) // 4)  # the last of them may be padded
        self.there = self.cache.go_on(rows, len(rows.held[0]) if rows.held else 0)  # read in an earlier turn of a race
        self.ids, self.counts = tokens[:, self.there :].to(self.device), (lengths - self.there).to(self.device)
        self.slot = rows.slot.to(self.device)
        self.cache.names = list(zip(rows.slots, rows.attempts, strict=False))
        self.eager = self.graphs is None or bool(rows.held)  # a graph of rows that go on would serve one turn of a race
        self.home = tokens.device

    def score(self, wave: Sequence[int]) -> Scores:
        start = self.cache.open(wave)
        slot, ids, counts = (rows_of(column, wave) for column in (self.slot, self.ids, self.counts))

        def forward(chunk: slice) -> Tensor:
            given, place = (slot[chunk], ids[chunk], counts[chunk]), start + chunk.start
            if self.graphs is not None and not self.eager:
                return self._replayed(self.graphs, place, *given)
            self.cache.select(slice(place, start + chunk.stop), self.there)
            return self._rewards(*given[1:])

        rewards = torch.cat(self.chunks.run([ids.shape[1]] * len(wave), forward))
        return Scores(rewards.to(self.home), counts.to(self.home))

    def _rewards(self, ids: Tensor, counts: Tensor) -> Tensor:
        """Read tokens [R, S] of the selected rows, counts [R] of them real; return the rewards [R]."""
        return self.head(self.cache.read(ids, counts, self._hidden), counts - 1)

    def _replayed(self, graphs: Graphs, place: int, slot: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
        """As `_rewards`, of rows that lie from `place` on, by a CUDA graph; the last is repeated up to a bucket."""
        (given, size), rows = ids.shape, bucket_of(len(ids))
        index = torch.arange(rows, device=self.device).clamp(max=given - 1)
        kept = self.buffers.take("pass", (rows, self.cache.segment_size + 2), torch.int64, self.device)[:rows]
        rewards = self.buffers.take("pass rewards", (rows,), torch.float64, self.device)[:rows]
        slot, counts, ids = (
            part.copy_(column[index])
            for part, column in ((kept[:, 0], slot), (kept[:, 1], counts), (kept[:, 2 : 2 + size], ids))
        )
        self.cache.select(slice(place, place + rows), slot=slot)
        graphs.keep(kept, rewards, *self.cache.tensors)

        def work() -> None:
            rewards.copy_(self._rewards(ids, counts))

        graphs.run((rows, place, size, len(self.cache.lengths)), work)
        return rewards[:given].clone()

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All that a commit reads and writes."""
        return self.cache.tensors

    def commit(self, commit: Commit) -> Settle:
        return self.cache.commit(commit.slot, commit.row, commit.length, commit.advance)

    def release(self) -> None:
        self.cache.release()

    def close(self) -> None:
        close_cache_of(self, ("slot", "ids", "counts"))

    def _hidden(self, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        return self.backbone(input_ids=ids, **inputs).last_hidden_state


def reward_output(model: PreTrainedModel, label: int) -> Output:
    """One output of a classifier's head: hidden [R, S, D] and each row's last token [R] -> [R] float64.

    The model may lie on several devices: the rewards are where its head is.
    """
    return linear_output(score_head(model, "reward_model"), label)


def linear_output(head: nn.Linear, label: int) -> Output:
    """One output of a linear layer."""
    quantized = type(head.weight) is not nn.Parameter
    weight = (head.weight.dequantize() if quantized else head.weight)[label]  # [D]
    bias = None if head.bias is None else head.bias[label : label + 1]

    def rewards(hidden: Tensor, last: Tensor) -> Tensor:
        return ops.reward_head(hidden.to(weight.device), last.to(weight.device), weight, bias=bias).double()

    return rewards
