"""The language model as a Proposer: prefill once, then sample all rows from the shared prefixes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stars_kernels.decoder.protocols import Admission, Commit, Proposal, Room, Rows, Settle, together
from stars_kernels.decoder.rules import Plan
from stars_kernels.decoder.transfer import to_device
from stars_kernels.hf.cache import close_cache_of, reserve_cache
from stars_kernels.hf.cache.buffers import Buffers
from stars_kernels.hf.cache.hidden import HiddenStates
from stars_kernels.hf.cache.prefill import packed_chunks
from stars_kernels.hf.proposing.graphs import Graphs, bucket_of, padded
from stars_kernels.hf.proposing.output_layer import hidden_of
from stars_kernels.hf.proposing.processors import SlotProcessors
from stars_kernels.hf.proposing.segment import Draws, Segment, Step, column
from stars_kernels.hf.view.logits import logits_of

NO_FILTER = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


class ModelProposer:
    """`model` is a view (`hf.view.copying.view_of`).

    A candidate's last token is not read, as nothing is drawn behind it, until it is decided: by a forward of one row a
    prompt. To read it with the others would cost a forward of all rows in each round, also in those that take none.
    Where hidden states are wanted it is read so, and leaves the logits for the next segment.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        graphs: Graphs | None = None,
        fuse: bool = False,
        hidden: HiddenStates | None = None,
        processors: SlotProcessors | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        """graphs: runs the steps of segments as CUDA graphs; None = eagerly. fuse: draw without storing logits; only
        for a model that `hf.proposing.output_layer.why_unfused` has nothing against.

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
        # [P] of the decided answer
        self.last_token = self.buffers.take("last token", (room.slots,), torch.int64, self.device)[: room.slots].zero_()
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
        given = (rows, plan, sampling, noise, eos, check_stop)
        if self.graphs is None or rows.held:  # a graph of rows that go on would serve one turn of a race
            tokens, logprobs, entropies = self._segment(*given)
        else:
            tokens, logprobs, entropies = self._segment_of_graphs(self.graphs, *given)
        if plan.race:
            self.cache.names = list(zip(rows.slots, rows.attempts, strict=True))
        self.candidates = tokens
        errors = {} if self.processors is None else self.processors.errors
        return Proposal(tokens, logprobs, None if plan.entropy is None else entropies, errors)

    def _segment(
        self,
        rows: Rows,
        plan: Plan,
        sampling: dict[str, Any],
        noise: int,
        eos: Tensor,
        check_stop: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw plan.size tokens of every row; return them, their log-probabilities and entropies, [R, <= size] each.

        On a GPU only processors wait for the host. check_stop: asked before each token.
        """
        if self.hidden is not None:
            self.hidden.open(len(rows))
        segment, draws = Segment.begin(rows, plan.size, eos), self._draws(plan, sampling, noise)
        # Whether to stop once all rows have ended. A look is free on a CPU; processors wait for the host anyway.
        looks = (self.device.type == "cpu" and self.graphs is None) or self.processors is not None
        held = rows.held_tokens()
        source: Tensor | None
        if rows.held:
            state, source = self._go_on(rows, held), None
        else:
            self.cache.fork(rows.slot)
            state, source = self.logits, rows.slot  # every first token comes from its slot's one row of logits
        count = 0
        for step in range(plan.size):
            check_stop()
            if self.processors is not None:
                logits, before = state if source is None else state[source], segment.tokens[:, :step]
                state, source = self.processors(rows, torch.cat([held, before], dim=1), logits, segment.ended), None
            if step > 0 and plan.entropy is not None:
                draws.measure(segment, step, state)
                if looks and bool(segment.ended.all()):
                    break
            draws.draw(segment, step, state, source)
            count = step + 1
            last = count == plan.size
            if not last and (looks or plan.entropy is not None):
                draws.end(segment, step)
                last = looks and bool(segment.ended.all())
            if last and self.hidden is None:
                break
            state, source = self._read(segment, draws, step, last), None
            if last:
                break
        return segment.tokens[:, :count], segment.logprobs[:, :count], segment.entropies[:, :count]

    def _segment_of_graphs(
        self,
        graphs: Graphs,
        rows: Rows,
        plan: Plan,
        sampling: dict[str, Any],
        noise: int,
        eos: Tensor,
        check_stop: Callable[[], None],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `_segment`, of more rows and to its full size, one CUDA graph a step: it reads a token and draws the next.

        The first token is drawn before, as every row's comes from its slot's one row of logits.
        """
        segment = self._open_graphs(graphs, padded(rows, bucket_of(len(rows))), eos)
        draws = self._draws(plan, sampling, noise)
        draws.draw(segment, 0, self.logits, segment.rows.slot)
        if plan.entropy is not None:
            draws.end(segment, 0)

        def step() -> None:
            state = self._read(segment, draws, segment.step)
            segment.step.add_(1)
            draws.measure(segment, segment.step, state)
            draws.draw(segment, segment.step, state)
            if plan.entropy is not None:
                draws.end(segment, segment.step)

        def last() -> None:
            self._read(segment, draws, segment.step, last=True)

        key = (len(segment.rows), self.slots, len(eos), draws.settings)
        for _ in range(plan.size - 1):
            check_stop()
            graphs.run((*key, "step"), step)
        if self.hidden is not None:
            graphs.run((*key, "last"), last)
        drawn = (segment.tokens, segment.logprobs, segment.entropies)
        tokens, logprobs, entropies = (tensor[: len(rows), : plan.size] for tensor in drawn)
        return tokens, logprobs, entropies

    def _open_graphs(self, graphs: Graphs, rows: Rows, eos: Tensor) -> Segment:
        """Begin a segment, and open its rows, in memory that stays; forget the graphs that work on other memory."""
        segment = Segment.begin(rows, self.cache.segment_size, eos, self.buffers)
        self.cache.fork(segment.rows.slot)
        tensors = [*segment.tensors, *self.cache.tensors]
        if self.hidden is None:
            shape = (bucket_of(self.slots), self.logits.shape[1])  # [>= P, V] see `_after`
            self.after = self.buffers.take("after", shape, self.logits.dtype, self.logits.device)
            tensors.append(self.after)
        else:
            self.hidden.open(len(rows))
            tensors += self.hidden.tensors
        graphs.keep(*tensors)
        return segment

    def _draws(self, plan: Plan, sampling: dict[str, Any], noise: int) -> Draws:
        plain = plan.draw == "sample" and plan.entropy is None and is_unfiltered(sampling)
        return Draws(plan, sampling, noise, self.head if plain else None)

    def _read(self, segment: Segment, draws: Draws, step: Step, last: bool = False) -> Tensor:
        """Read the rows' tokens of a step; return what the next are drawn from: logits [R, V], or hidden states [R, D].

        last: nothing is drawn behind it. Where hidden states are scored, they are kept, and the logits behind the last.
        """
        ids, fused = segment.tokens[:, column(step)].clamp(min=0), draws.head is not None and not last
        with self.cache.extend(1) if isinstance(step, int) else self.cache.extend_at(step) as inputs:
            state = hidden_of(self.model, ids, inputs) if fused else self._logits(ids, inputs, 1)
        if self.hidden is not None:
            count, held = len(segment.rows), len(segment.rows.held[0]) if segment.rows.held else 0
            self.hidden.rows[:count, column(held + step)] = state if fused else self.hidden.last
            after = self.hidden.logits[:count]
            if draws.plan.entropy is not None:  # what follows a row is what follows its own last token
                after.copy_(torch.where(segment.ended[:, None], after, state[:, 0]))
            elif last:
                after.copy_(state[:, 0])
        return state[:, 0]

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
        else:  # a candidate's last token was not read, so its keys and values are not among the suffix's
            settles.append(self.cache.commit(commit.slot, commit.row, commit.length - 1, commit.advance))
            settles.append(self._late(commit))
        if self.processors is not None:
            settles.append(self.processors.commit(commit, self.candidates))
        return together(settles)

    def _late(self, commit: Commit) -> Settle:
        """Keep the last tokens of the segments that become a part of their prefix, to be read once they are needed."""
        last = commit.last_token.where(commit.advance, self.last_token[commit.slot])
        last_token = self.last_token.index_put((commit.slot,), last)
        unread = self.unread.union(p for p, _, _, advance in commit.host if advance)

        def settle() -> None:
            self.last_token.copy_(last_token)  # in place: graphs read it there
            self.unread = unread

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
        close_cache_of(self, ("logits", "after", "last_token", "unread", "candidates"))

    @property
    def reads_late(self) -> bool:
        """Whether a segment's last token is read after it is decided; else it was read with the others."""
        return self.hidden is None

    @property
    def tensors(self) -> list[Tensor]:
        """All that a commit reads and writes."""
        kept = [] if self.hidden is None else [self.logits, self.hidden.best_logits, *self.hidden.tensors]
        return [self.last_token, *self.cache.tensors, *kept]

    def _read_last(self, slots: list[int]) -> None:
        """Feed the last decided token of these slots, all of them unread."""
        if not slots:
            return
        (slot,) = to_device([slots], self.device)
        unread = self.unread.difference(slots)
        self.read_last(slots, slot, torch.ones_like(slot, dtype=torch.bool))
        self.unread = unread

    def read_last(self, slots: Sequence[int], slot: Tensor, unread: Tensor) -> None:
        """Feed the last decided token of those of these slots [C] that `unread` [C] says: one row per slot."""
        after = self._after(slots, slot)[: len(slot)]
        logits = after.where(unread[:, None], self.logits[slot])
        settle = self.cache.commit(slot, torch.arange(len(slot), device=self.device), unread.long(), unread)
        # The two go together: with one of them alone, tokens would be fed twice, or not at all.
        self.logits[slot] = logits
        settle()

    def _after(self, slots: Sequence[int], slot: Tensor) -> Tensor:
        """Read the last decided token of these slots [C]; return the logits [C, V] behind it, and perhaps more rows."""
        if self.graphs is None:
            self.cache.fork(slot)
            with self.cache.extend(1) as inputs:
                return self._logits(self.last_token[slot, None], inputs, 1)[:, 0]
        rows = Rows(slots, slot, slot, slot, slot)  # nothing is drawn, so their slots alone matter
        segment = self._open_graphs(self.graphs, padded(rows, bucket_of(len(slot))), slot[:0])
        segment.tokens[:, 0] = self.last_token[segment.rows.slot]
        after = self.after[: len(segment.rows)]

        def read() -> None:
            with self.cache.extend_at(segment.step) as inputs:
                after.copy_(self._logits(segment.tokens[:, :1], inputs, 1)[:, 0])

        self.graphs.run((len(after), self.slots, "decided"), read)
        return after

    def _logits(self, ids: Tensor, inputs: dict[str, Any], keep: int | Tensor) -> Tensor:
        with nullcontext() if self.hidden is None else self.hidden.catch():
            return logits_of(self.model, ids, inputs, keep)


def is_unfiltered(sampling: dict[str, Any]) -> bool:
    """Whether draws need no more than the temperature: a filter would need the whole row of logits."""
    return all(sampling[name] == off for name, off in NO_FILTER.items())
