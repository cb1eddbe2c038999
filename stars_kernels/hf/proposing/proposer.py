"""The language model as a Proposer: prefill once, then sample all rows from the shared prefixes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stars_kernels import ops
from stars_kernels.decoder.protocols import Admission, Commit, Proposal, Room, Rows, Settle, together
from stars_kernels.decoder.rules import Plan
from stars_kernels.decoder.transfer import to_device
from stars_kernels.hf.cache import close_cache_of, reserve_cache
from stars_kernels.hf.cache.buffers import Buffers
from stars_kernels.hf.cache.hidden import HiddenStates
from stars_kernels.hf.cache.prefill import packed_chunks
from stars_kernels.hf.proposing.draws import entropy, likeliest
from stars_kernels.hf.proposing.graphs import SegmentGraphs, Tensors, bucket_of, padded
from stars_kernels.hf.proposing.output_layer import hidden_of
from stars_kernels.hf.proposing.processors import SlotProcessors
from stars_kernels.hf.view.logits import logits_of

NO_FILTER = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


class ModelProposer:
    """`model` is a view (`hf.view.copying.view_of`).

    A candidate's last token is not read, as nothing is drawn behind it, until it is decided: by a forward of one row a
    prompt. Where hidden states are wanted it is read as the others are, and leaves the logits for the next segment.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        graphs: SegmentGraphs | None = None,
        fuse: bool = False,
        hidden: HiddenStates | None = None,
        processors: SlotProcessors | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        """graphs: runs segments as CUDA graphs; None = eagerly. fuse: draw without storing logits; only for
        a model that `hf.proposing.output_layer.why_unfused` has nothing against.

        hidden: where to keep the hidden states of prompts and candidates; None = they are not wanted.
        processors: asked for the logits of every token; with them, neither graphs nor fuse.
        buffers: where its memory comes from and stays, as `graphs` do; None = memory of its own.
        """
        self.model = model
        self.processors = processors
        self.device = model.device
        self.graphs = graphs
        self.hidden = hidden
        self.buffers = Buffers() if buffers is None else buffers
        self.head: Tensor | None = model.get_output_embeddings().weight if fuse else None

    def reserve(self, room: Room) -> None:
        self.close()
        self.slots = room.slots
        self.cache = reserve_cache(self.model, room.slots, room.tokens, room.segment, self.buffers)
        self.last_token = torch.zeros(room.slots, dtype=torch.int64, device=self.device)  # [P] of the decided answer
        self.unread: frozenset[int] = frozenset()  # the slots whose last token is not in the cache yet
        if self.hidden is not None:
            self.hidden.reserve(room)

    def admit(self, admissions: Sequence[Admission]) -> list[int]:
        unread = self.cache.admit(admissions)
        self.unread = self.unread.difference(a.slot for a in admissions)
        if self.processors is not None:
            self.processors.admit(admissions)
        for chunk in packed_chunks(unread, self.cache):
            ids, last, finished = to_device([chunk.ids, chunk.last, chunk.finished], self.device)
            with self.cache.prefill(chunk.slots, chunk.counts) as inputs:
                logits = self._logits(ids[None], inputs, last)[0]
            if not hasattr(self, "logits"):  # [P, V] of what follows each prefix
                shape = (self.slots, logits.shape[1])
                self.logits = self.buffers.take("logits", shape, logits.dtype, logits.device)[: self.slots]
            self.logits[finished] = logits
            if self.hidden is not None:
                read = self.hidden.last[0]
                read = read if len(read) == len(last) else read[last]  # all, where it takes no logits_to_keep
                self.hidden.admit(finished, read, self.logits)
        return [len(unread[a.slot]) for a in admissions]

    def propose(
        self, rows: Rows, plan: Plan, sampling: dict[str, Any], noise: int, eos: Tensor, check_stop: Callable[[], None]
    ) -> Proposal:
        check_stop()
        self._read_last([p for p in dict.fromkeys(rows.slots) if p in self.unread])
        if self.processors is not None:
            self.processors.forget()
        wide = rows if self.graphs is None else padded(rows, bucket_of(len(rows)))
        if self.hidden is not None:
            self.hidden.open(len(wide))
        if self.graphs is None or rows.held:  # a graph of rows that go on would serve one turn of a race
            drawn = self._segment(rows, plan, sampling, noise, eos, check_stop)
        else:
            self.cache.fork(wide.slot)  # its buffers grow before their place is asked for
            kept = self.buffers.take("eos", eos.shape, eos.dtype, eos.device)[: len(eos)]  # where a graph may read it
            kept.copy_(eos)
            storage = (*self.cache.storage, self.logits.data_ptr(), kept.data_ptr())
            storage += () if self.hidden is None else self.hidden.storage
            count = plan.attempts if plan.draw == "likeliest" else None
            sizes = (plan.size, len(self.logits), len(eos))  # of a row's tokens, the slots, the tokens that end one
            settings = (*sizes, plan.draw, count, plan.entropy, self.head is not None, noise, *sampling.items())
            eos = kept
            run = functools.partial(self._segment, plan=plan, sampling=sampling, noise=noise, eos=eos)
            drawn = tuple(tensor[: len(rows)] for tensor in self.graphs.run(run, wide, settings, storage))
        if plan.race:
            self.cache.names = list(zip(rows.slots, rows.attempts, strict=True))
        self.candidates = drawn[0]
        entropies = None if plan.entropy is None else drawn[2]
        return Proposal(drawn[0], drawn[1], entropies, {} if self.processors is None else self.processors.errors)

    def _segment(
        self,
        rows: Rows,
        plan: Plan,
        sampling: dict[str, Any],
        noise: int,
        eos: Tensor,
        check_stop: Callable[[], None] | None = None,
    ) -> Tensors:
        """Draw plan.size tokens of every row, and return the first fields of a `Proposal`.

        On a GPU only processors wait for the host. check_stop: asked before each token; None in a graph.
        """
        cache, held = self.cache, rows.held_tokens()
        shape, bound = (len(rows), plan.size), plan.entropy
        tokens = torch.empty(shape, dtype=torch.int64, device=self.device)
        logprobs = torch.empty(shape, dtype=torch.float64, device=self.device)
        entropies = None if bound is None else torch.full_like(logprobs, torch.nan)
        ended = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        # Whether to stop once all rows have ended. A look is free on a CPU; processors wait for the host anyway.
        looks = (self.device.type == "cpu" and self.graphs is None) or self.processors is not None
        source: Tensor | None
        if rows.held:
            state, source = self._go_on(rows, held), None
        else:
            cache.fork(rows.slot)
            state, source = self.logits, rows.slot  # every first token comes from its slot's one row of logits
        # From the second token on, `state` is what the last step's draws come from: logits, or hidden states if fused.
        plain = plan.draw == "sample" and bound is None and is_unfiltered(sampling)
        head = self.head if plain else None
        count = 0
        for step in range(plan.size):
            if check_stop is not None:
                check_stop()
            if self.processors is not None:
                logits = state if source is None else state[source]
                state, source = self.processors(rows, torch.cat([held, tokens[:, :step]], dim=1), logits, ended), None
            if bound is not None and entropies is not None and step > 0:
                entropies[:, step] = entropy(state)
                ended |= entropies[:, step] >= bound
                if looks and bool(ended.all()):
                    break
            draws = (rows.key, rows.attempt, rows.position + step)
            if plan.draw == "likeliest":
                token, logprob = likeliest(state, source, rows.attempt, plan.attempts)
            elif head is None or step == 0:
                token, logprob = ops.segment_sample(state, *draws, source=source, stream=noise, **sampling)
            else:
                temperature = sampling["temperature"]
                token, logprob = ops.lm_head_sample(state, head, *draws, temperature=temperature, stream=noise)
            tokens[:, step], logprobs[:, step] = token, logprob
            count = step + 1
            last = count == plan.size
            if not last and (looks or bound is not None):
                ended |= torch.isin(token, eos) | (token < 0)
                last = looks and bool(ended.all())
            if last and self.hidden is None:
                break
            fused = head is not None and not last
            with cache.extend(1) as inputs:
                ids = token[:, None].clamp(min=0)
                state = hidden_of(self.model, ids, inputs) if fused else self._logits(ids, inputs, 1)
            if self.hidden is not None:
                self.hidden.rows[: len(rows), held.shape[1] + step] = (state if fused else self.hidden.last)[:, 0]
                if bound is not None:  # what follows a row is what follows its own last token
                    after = self.hidden.logits[: len(rows)]
                    after.copy_(torch.where(ended[:, None], after, state[:, 0]))
                elif last:
                    self.hidden.logits[: len(rows)] = state[:, 0]
                if last:
                    break
            state, source = state[:, 0], None
        drawn = (tokens[:, :count], logprobs[:, :count])
        return drawn if entropies is None else (*drawn, entropies[:, :count])

    def _go_on(self, rows: Rows, held: Tensor) -> Tensor:
        """Read the rows' own tokens [R, H], all but what the cache still holds of them; return the logits after them.

        The last one at least: a candidate's last token is not read before it goes on.
        """
        there = self.cache.go_on(rows, held.shape[1] - 1)
        steps = 1 if self.cache.layout.steps else held.shape[1]
        for ids in held[:, there:].split(steps, dim=1):
            with self.cache.extend(ids.shape[1]) as inputs:
                logits = self._logits(ids, inputs, 1)
        return logits[:, 0]

    def commit(self, commit: Commit) -> Settle:
        settles = []
        if self.hidden is not None:
            settles.append(self.cache.commit(commit.slot, commit.row, commit.length, commit.advance))
            settles.append(self.hidden.commit(commit, self.logits))
            last_token, unread = self.last_token, self.unread
        else:  # a candidate's last token was not read, so its keys and values are not among the suffix's
            settles.append(self.cache.commit(commit.slot, commit.row, commit.length - 1, commit.advance))
            last = commit.last_token.where(commit.advance, self.last_token[commit.slot])
            last_token = self.last_token.index_put((commit.slot,), last)
            unread = self.unread.union(p for p, _, _, advance in commit.host if advance)
        if self.processors is not None:
            settles.append(self.processors.commit(commit, self.candidates))

        settle_parts = together(settles)

        def settle() -> None:
            settle_parts()
            self.last_token, self.unread = last_token, unread

        return settle

    def release(self) -> None:
        if self.graphs is not None:
            self.graphs.clear()
        self.cache.release()
        if self.processors is not None:
            self.processors.forget()
        if self.hidden is not None:
            self.hidden.release()

    def close(self) -> None:
        if self.hidden is not None:
            self.hidden.close()
        if self.processors is not None:
            self.processors.close()
        close_cache_of(self, ("logits", "last_token", "unread", "candidates"))

    def _read_last(self, slots: list[int]) -> None:
        """Feed the last decided token of these slots: one row per slot."""
        if not slots:
            return
        (slot,) = to_device([slots], self.device)
        self.cache.fork(slot)
        with self.cache.extend(1) as inputs:
            self.logits[slot] = self._logits(self.last_token[slot, None], inputs, 1)[:, 0]
        one, rows = torch.ones_like(slot), torch.arange(len(slot), device=self.device)
        settle = self.cache.commit(slot, rows, one, one.bool())
        unread = self.unread.difference(slots)
        settle()  # the two go together: with one of them alone, tokens would be fed twice, or not at all
        self.unread = unread

    def _logits(self, ids: Tensor, inputs: dict[str, Any], keep: int | Tensor) -> Tensor:
        with nullcontext() if self.hidden is None else self.hidden.catch():
            return logits_of(self.model, ids, inputs, keep)


def is_unfiltered(sampling: dict[str, Any]) -> bool:
    """Whether draws need no more than the temperature: a filter would need the whole row of logits."""
    return all(sampling[name] == off for name, off in NO_FILTER.items())
