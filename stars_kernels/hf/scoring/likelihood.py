"""The likelihood of an answer, or how much more likely one model finds it than another: DPO's implicit reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stars_kernels.decoder.protocols import Admission, Commit, Room, Rows, Scores, Settle, together
from stars_kernels.decoder.transfer import rows_of, to_device
from stars_kernels.hf.cache import close_cache_of, reserve_cache
from stars_kernels.hf.cache.buffers import Buffers
from stars_kernels.hf.cache.prefill import packed_chunks
from stars_kernels.hf.scoring.chunks import Chunks
from stars_kernels.hf.view.layout import vocabulary
from stars_kernels.hf.view.logits import logits_of

LOGITS = 1 << 25
"""Logits of one scoring forward, at most (or one token's), and as many log-probabilities beside them."""


class LikelihoodScorer:
    """log p(answer | prompt) under a model, less that under a reference: a sum over the answer's tokens, EOS included.

    At temperature 1 and unfiltered; 0 for the empty answer. beta * (log p - log p_ref) is the reward that DPO trains
    its policy for, up to a constant of the prompt (arXiv 2305.18290, eq. 5).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reference: PreTrainedModel | None = None,
        chunks: Chunks | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        """Views with the stars attention that read the language model's token ids, each on any device.

        buffers: where the caches take their memory from, and leave it; None = memory of their own.
        """
        chunks, buffers = chunks or likelihood_chunks(model), buffers or Buffers()
        sides = enumerate(side for side in (model, reference) if side is not None)
        self.sides = [_Likelihood(side, chunks, buffers.part(i)) for i, side in sides]

    def reserve(self, room: Room) -> None:
        for side in self.sides:
            side.reserve(room)

    def admit(self, admissions: Sequence[Admission]) -> Scores:
        tokens = torch.tensor([side.admit(admissions) for side in self.sides]).sum(dim=0)
        return Scores(torch.zeros(len(admissions), dtype=torch.float64), tokens)

    def open(self, rows: Rows, tokens: Tensor, lengths: Tensor) -> None:
        for side in self.sides:
            side.open(rows.slot, tokens, lengths)
        self.lengths, self.home = lengths, tokens.device

    def score(self, wave: Sequence[int]) -> Scores:
        first, *second = [side.score(wave).to(self.home) for side in self.sides]
        read = rows_of(self.lengths, wave) * len(self.sides)
        return Scores(first - second[0] if second else first, read)

    def commit(self, commit: Commit) -> Settle:
        return together([side.commit(commit) for side in self.sides])

    def release(self) -> None:
        for side in self.sides:
            side.release()

    def close(self) -> None:
        for side in self.sides:
            side.close()


def likelihood_chunks(model: PreTrainedModel) -> Chunks:
    """Forwards of at most LOGITS logits."""
    return Chunks(LOGITS // vocabulary(model))


class _Likelihood:
    """One model with a cache of its own, which reads each decided token once.

    total, best     [P]     log p of the decided answer, and of that + the winner or the best so far
    next_log_probs  [P, V]  of the token after the decided answer
    best_logits     [P, V]  after the winner or the best so far
    row_total, row_logits   [R], [R, V]  of a round's candidates, those that were scored
    """

    def __init__(self, model: PreTrainedModel, chunks: Chunks, buffers: Buffers) -> None:
        self.model, self.device, self.chunks, self.buffers = model, model.device, chunks, buffers
        self.dtype = torch.float64 if model.dtype == torch.float64 else torch.float32  # of log-probabilities

    def reserve(self, room: Room) -> None:
        self.close()
        self.cache = reserve_cache(self.model, room.slots, room.tokens, room.segment, self.buffers)
        self.total = torch.zeros(room.slots, dtype=torch.float64, device=self.device)
        self.best = self.total.clone()

    def admit(self, admissions: Sequence[Admission]) -> list[int]:
        """Read the prompts; return how many tokens of each that took."""
        unread = self.cache.admit(admissions)
        for chunk in packed_chunks(unread, self.cache):
            ids, last, finished = to_device([chunk.ids, chunk.last, chunk.finished], self.device)
            with self.cache.prefill(chunk.slots, chunk.counts) as inputs:
                logits = logits_of(self.model, ids[None], inputs, last)[0]
            if not hasattr(self, "best_logits"):
                shape = (len(self.total), logits.shape[1])
                self.best_logits, self.next_log_probs = (
                    logits.new_empty(shape),
                    logits.new_empty(shape, dtype=self.dtype),
                )
            self.next_log_probs[finished] = logits.log_softmax(-1, self.dtype)
            self.total[finished] = 0
        return [len(unread[a.slot]) for a in admissions]

    def open(self, slot: Tensor, tokens: Tensor, lengths: Tensor) -> None:
        """Take candidates tokens[r, :lengths[r]] behind the decided answer of slot[r]."""
        self.slot, self.tokens, self.lengths = (column.to(self.device) for column in (slot, tokens, lengths))
        self.row_logits = self.best_logits.new_empty(len(tokens), self.best_logits.shape[1])
        self.row_total = self.total.new_empty(len(tokens))
        self.cache.fork(self.slot)

    def score(self, wave: Sequence[int]) -> Tensor:
        """log p [len(wave)] of the decided answer and the candidate, of these rows."""
        slot, tokens, lengths = (rows_of(column, wave) for column in (self.slot, self.tokens, self.lengths))
        rows, size = tokens.shape
        log_probs = torch.empty(rows, size, dtype=torch.float64, device=self.device)
        log_probs[:, 0] = self.next_log_probs[slot, tokens[:, 0]]
        (row,) = to_device([wave], self.device)
        lies = self.cache.open(wave)

        def forward(some: slice) -> None:
            ids, count = tokens[some], lengths[some]  # [r, S], [r]
            self.cache.select(slice(lies + some.start, lies + some.stop))
            steps = max(1, LOGITS // (len(ids) * self.best_logits.shape[1]))
            for start in range(0, size, steps):
                part, following = ids[:, start : start + steps], ids[:, start + 1 : start + steps + 1]
                real = (count - start).clamp(0, part.shape[1])
                logits = self.cache.read(part, real, self._all_logits)  # [r, steps, V]
                found = logits[:, : following.shape[1]].log_softmax(-1, self.dtype).gather(2, following[..., None])
                log_probs[some, start + 1 : start + 1 + following.shape[1]] = found[..., 0]  # token t + 1's lies at t
                last = count - 1 - start
                here = (0 <= last) & (last < part.shape[1])
                self.row_logits[row[some][here]] = logits[here, last[here]]

        self.chunks.run([size] * rows, forward)
        # In order, so that a sum does not depend on what lies behind the candidate's end.
        row_total = self.total[slot] + log_probs.cumsum(dim=1).gather(1, lengths[:, None] - 1)[:, 0]
        self.row_total[row] = row_total
        return row_total

    def commit(self, commit: Commit) -> Settle:
        columns = (commit.slot, commit.row, commit.length, commit.advance)
        slot, row, length, advance = (column.to(self.device) for column in columns)
        settle_cache = self.cache.commit(slot, row, length, advance)
        found, grown = row >= 0, slot[advance]
        best = self.best.index_put((slot[found],), self.row_total[row[found]])
        best_logits = self.best_logits.index_put((slot[found],), self.row_logits[row[found]])
        total = self.total.index_put((grown,), best[grown])
        log_probs = best_logits[grown].log_softmax(-1, self.dtype)
        next_log_probs = self.next_log_probs.index_put((grown,), log_probs)

        def settle() -> None:
            settle_cache()
            self.best, self.best_logits, self.total, self.next_log_probs = best, best_logits, total, next_log_probs

        return settle

    def release(self) -> None:
        self.cache.release()
        self.row_logits = self.best_logits[:0]

    def close(self) -> None:
        close_cache_of(self, ("total", "best", "best_logits", "next_log_probs", "row_logits", "row_total", "tokens"))

    def _all_logits(self, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        return logits_of(self.model, ids, inputs, 0)
