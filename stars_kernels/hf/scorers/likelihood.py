"""The likelihood of an answer, or how much more likely one model finds it than another: DPO's implicit reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stars_kernels.decoder.protocols import Commit, Rows, Scores
from stars_kernels.hf.cache import open_cache
from stars_kernels.hf.proposer import logits_of, packed_chunks
from stars_kernels.hf.scorers.chunks import Chunks

LOGITS = 1 << 25
"""Logits of one scoring forward, at most (unless one row has more), and as many log-probabilities beside them."""


class LikelihoodScorer:
    """log p(answer | prompt) under a model, less that under a reference: a sum over the answer's tokens, EOS included.

    At temperature 1 and unfiltered; 0 for the empty answer. beta * (log p - log p_ref) is the reward that DPO trains
    its policy for, up to a constant of the prompt (arXiv 2305.18290, eq. 5).
    """

    def __init__(
        self, model: PreTrainedModel, reference: PreTrainedModel | None = None, chunks: Chunks | None = None
    ) -> None:
        """Views with the stars attention that read the language model's token ids, each on any device."""
        chunks = chunks or likelihood_chunks(model)
        self.sides = [_Likelihood(side, chunks) for side in (model, reference) if side is not None]

    def begin(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, segment_size: int) -> Scores:
        for side in self.sides:
            side.begin(prompts, max_new_tokens, segment_size)
        tokens = torch.tensor([len(prompt) for prompt in prompts])
        return Scores(torch.zeros(len(prompts), dtype=torch.float64), tokens * len(self.sides))

    def score(self, rows: Rows, tokens: Tensor, lengths: Tensor) -> Scores:
        first, *second = [side.score(rows.prompt, tokens, lengths).to(tokens.device) for side in self.sides]
        return Scores(first - second[0] if second else first, lengths * len(self.sides))

    def commit(self, commit: Commit) -> None:
        for side in self.sides:
            side.commit(commit)

    def release(self) -> None:
        for side in self.sides:
            side.release()


def likelihood_chunks(model: PreTrainedModel) -> Chunks:
    """Forwards of at most LOGITS logits."""
    return Chunks(LOGITS // model.config.get_text_config().vocab_size)


class _Likelihood:
    """One model with a cache of its own, which reads each accepted token once.

    total, best     [P]     log p of the accepted answer, and of that + the winner or the best so far
    next_log_probs  [P, V]  of the token after the accepted answer
    best_logits     [P, V]  after the winner or the best so far
    row_total, row_logits   [R], [R, V]  of a round's candidates
    """

    def __init__(self, model: PreTrainedModel, chunks: Chunks) -> None:
        self.model, self.device, self.chunks = model, model.device, chunks
        self.dtype = torch.float64 if model.dtype == torch.float64 else torch.float32  # of log-probabilities

    def begin(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, segment_size: int) -> None:
        capacities = [len(prompt) + max_new_tokens for prompt in prompts]
        self.cache = open_cache(self.model, capacities, segment_size)
        logits = []
        for chunk in packed_chunks(prompts, self.cache):
            last = torch.tensor(chunk.last, dtype=torch.int64, device=self.device)
            with self.cache.prefill(chunk.owners, chunk.counts) as inputs:
                logits.append(logits_of(self.model, torch.tensor([chunk.ids], device=self.device), inputs, last)[0])
        self.best_logits = torch.cat(logits)
        self.next_log_probs = self.best_logits.log_softmax(-1, self.dtype)
        self.total = torch.zeros(len(prompts), dtype=torch.float64, device=self.device)
        self.best = self.total.clone()

    def score(self, prompt: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """log p [R] of the accepted answer of `prompt` [R] and tokens[r, :lengths[r]] behind it."""
        prompt, tokens, lengths = (column.to(self.device) for column in (prompt, tokens, lengths))
        rows, size = tokens.shape
        log_probs = torch.empty(rows, size, dtype=torch.float64, device=self.device)
        log_probs[:, 0] = self.next_log_probs[prompt, tokens[:, 0]]
        self.row_logits = self.best_logits.new_empty(rows, self.best_logits.shape[1])
        index = torch.arange(rows, device=self.device)
        self.cache.fork(prompt)

        def forward(some: slice) -> None:
            ids, count = tokens[some], lengths[some]
            self.cache.select(some)
            with self.cache.extend(size, count) as inputs:
                logits = logits_of(self.model, ids, inputs, 0)  # [r, S, V]
            found = logits.log_softmax(-1, self.dtype)[:, :-1].gather(2, ids[:, 1:, None])  # token t + 1's lies at t
            log_probs[some, 1:] = found[:, :, 0]
            self.row_logits[some] = logits[index[: len(ids)], count - 1]

        self.chunks.run([size] * rows, forward)
        # In order, so that a sum does not depend on what lies behind the candidate's end.
        self.row_total = self.total[prompt] + log_probs.cumsum(dim=1)[index, lengths - 1]
        return self.row_total

    def commit(self, commit: Commit) -> None:
        columns = (commit.prompt, commit.row, commit.length, commit.advance)
        prompt, row, length, advance = (column.to(self.device) for column in columns)
        self.cache.commit(prompt, row, length, advance)
        found = row >= 0
        self.best[prompt[found]] = self.row_total[row[found]]
        self.best_logits[prompt[found]] = self.row_logits[row[found]]
        grown = prompt[advance]
        self.total[grown] = self.best[grown]
        self.next_log_probs[grown] = self.best_logits[grown].log_softmax(-1, self.dtype)

    def release(self) -> None:
        self.cache.release()
        self.row_logits = self.best_logits[:0]
