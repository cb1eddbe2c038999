"""ForkCache: one stored prefix per slot, one short suffix per row, read through transformers' attention hook.

    arena   [G, 2, N, Hkv, D]    slot p has the places from offset_p on, the first length_p of them hold its prefix
    suffix  [G, 2, R, T, Hkv, D] a row's own tokens since the prefix

`fork` opens rows on their slots' prefixes, `rollback` shortens what the rows hold, `commit` moves chosen suffixes
behind the prefixes. The model is never patched: its attention calls reach the cache of the forward that runs in their
thread (`hf.view.attention`). Keys and values are stored there, not in `update()`, which latent attention calls before
it expands them. Layers whose keys and values are of one shape, dtype and device share an arena and a suffix (`Group`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from stars_kernels import ops
from stars_kernels.decoder.protocols import Admission, Rows, Settle
from stars_kernels.decoder.transfer import to_device, to_host
from stars_kernels.hf.cache.buffers import Buffers
from stars_kernels.hf.cache.recurrent import States
from stars_kernels.hf.cache.storage import BoundLayer, Group, Packed, Place, Suffix
from stars_kernels.hf.view.attention import Mask, Rotate, Rotation, answered_by, check_options
from stars_kernels.hf.view.layout import Layout


class ForkCache(Cache):
    """Storage and attention of one model for several requests, one per slot."""

    def __init__(
        self, layout: Layout, slots: int, tokens: int, segment_size: int, device: torch.device,
        states: States | None = None, buffers: Buffers | None = None,
    ) -> None:  # fmt: skip
        """tokens: of the prompts and answers of all slots. device: where the bookkeeping lies.

        buffers: where the memory comes from and stays; None = memory of its own.
        """
        self._own = Buffers()
        buffers = self._own if buffers is None else buffers
        self.layout, self.segment_size, self.device, self.states = layout, segment_size, device, states
        self.packs = layout.mode == "hook" and states is None
        """Whether a forward may read several prompts, one after the other."""
        self.cuts = states is None
        """Whether a prompt may be read in several forwards."""
        self.copies = layout.mode == "hook" and states is None
        """Whether a prompt that begins like another may have that one's keys and values."""
        self.layers = [] if states is None else states.layers
        self.offsets, self.lengths = (  # [P], where captured graphs may read them
            buffers.take(name, (slots,), torch.int64, device)[:slots].zero_() for name in ("offsets", "lengths")
        )
        self._forked = self.slot = self.lengths[:0]  # [R] the slot of each forked row, and of each selected one
        self._waiting: Tensor | None = None  # [R] of rows that open in waves; None = all are open, in order
        self._opened: list[int] = []  # the open ones of these, as they lie in the suffixes
        self.held = 0  # suffix tokens every open row holds
        self.names: list[tuple[int, int]] = []
        """The slot and attempt of each forked row, all in one wave, where some may go on (`go_on`); the next fork
        forgets them."""
        own = [plane for layer in layout.layers if layer.source is None for plane in (layer.key, layer.value)]
        self._groups = {plane: Group(plane, own.count(plane), tokens, segment_size, buffers) for plane in own}
        self._places = {d: self._place(d) for d in [device, *(group.device for group in self.groups)]}
        self._selected = slice(0)
        self._layers = self._bind(self._selected)
        self._asked = 0  # attention calls of the running forward
        self._rotation: Rotation | None = None  # what the next one has left to be turned
        self.makes_mask = False

    @property
    def groups(self) -> list[Group]:
        return list(self._groups.values())

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV this cache takes: the slots' part of the arena, and rows * segment_size of suffix."""
        return max((g.arena.shape[2] + g.suffix.shape[2] * g.suffix.shape[3] for g in self.groups), default=0)

    @property
    def kv_bytes(self) -> int:
        return sum(group.arena.nbytes + group.suffix.nbytes for group in self.groups)

    @property
    def tensors(self) -> list[Tensor]:
        """The buffers: a captured graph of this cache is worth nothing once one of them lies elsewhere."""
        return [self.offsets, self.lengths, *(t for group in self.groups for t in (group.arena, group.suffix))]

    def admit(self, admissions: Sequence[Admission]) -> dict[int, Sequence[int]]:
        """Let these slots hold what can be copied of their prompts; return what of each is to be read, by slot."""
        shared = [a.shared if self.copies else 0 for a in admissions]
        for a, count in zip(admissions, shared, strict=True):
            if count and a.source != a.place:
                for group in self.groups:
                    group.copy(a.source, a.place, count)
        columns = [a.slot for a in admissions], [a.place for a in admissions], shared
        slot, place, length = to_device(columns, self.device)
        self.offsets[slot], self.lengths[slot] = place, length
        self._send()
        return {a.slot: a.prompt[count:] for a, count in zip(admissions, shared, strict=True)}

    def fork(self, slot: Tensor) -> None:
        """Open one row for each entry of `slot` [R] on that slot's prefix; no key or value is copied."""
        self._forked, self.names, self._waiting, self._opened = slot.to(self.device), [], None, []
        self.make_room(slot.shape[0])
        if self.states is not None:
            self.states.fork(self._forked)
        self.select(slice(slot.shape[0]))

    def make_room(self, rows: int) -> None:
        """Take the memory of as many rows, those of padding included; what rows held before may be lost."""
        for group in self.groups:
            group.make_room(rows)

    def open(self, wave: Sequence[int]) -> int:
        """Let these of the forked rows, in rising order, lie behind those of the waves before; no row is in two waves.

        Returns where the first one lies, for `select`. `commit` still knows a row by its number among the forked.
        """
        if self._waiting is None:
            if len(wave) == len(self._forked):  # all of them, as they lie already
                return 0
            self._waiting = self._forked
        start = len(self._opened)
        self._opened += wave
        (opened,) = to_device([self._opened], self.device)
        self._forked = self._waiting[opened]
        if self.states is not None:
            self.states.slot = self._forked
        return start

    def go_on(self, rows: Rows, held: int) -> int:
        """Open rows that have read `held` tokens since their prefix, with what is still there of these.

        Where they are among the rows that were forked last, under their `names`, that is all, and no memory is taken.
        Else it is nothing: so also of rows with states, which cannot be cut back.

        Returns how many tokens are there.
        """
        names, last = list(zip(rows.slots, rows.attempts, strict=False)), self.names
        kept = [last.index(name) for name in names if name in last]
        if not held or self.states is not None or len(kept) < len(rows) or kept != sorted(kept):
            self.fork(rows.slot)
            return 0
        self.names = []
        for group in self.groups:
            group.keep(kept, held)
        self._forked = self._forked[kept]
        self.select(slice(len(kept)), held)
        return held

    def select(self, rows: slice, held: int = 0, slot: Tensor | None = None) -> None:
        """Let the next forwards extend these of the forked rows alone, behind the first `held` tokens of their own.

        slot: the slot of each, and of padding behind the last, for which there is room; None = those of the fork.
        """
        self.slot, self.held, self._selected = self._forked[rows] if slot is None else slot, held, rows
        self._layers = self._bind(rows)
        self._send()
        if self.states is not None:
            self.states.open(rows)

    def cut(self, slot: Tensor, length: Tensor) -> None:
        """Shorten the prefixes of `slot` [C] to `length` [C] tokens where they are longer; no byte moves."""
        if self.states is not None and bool((self.lengths[slot] > length).any()):
            raise ValueError("a prefix is to be cut short, but this model has states, which have no tokens to cut")
        self.lengths[slot] = torch.minimum(self.lengths[slot], length)

    def rollback(self, held: int = 0) -> None:
        """Forget all but the first `held` suffix tokens of every row; no key or value moves."""
        if not 0 <= held <= self.held:
            raise ValueError(f"rollback to {held} suffix tokens, expected 0 to {self.held}")
        if self.states is not None and held != self.held:
            if held:
                raise ValueError(f"rollback to {held} suffix tokens, expected 0: the model has states, kept per prefix")
            self.states.open(self._selected)
        self.held = held

    def release(self) -> None:
        """Give back the memory of the suffixes; the next fork takes what it needs."""
        for group in self.groups:
            group.release()
        self.fork(self._forked[:0])

    def close(self) -> None:
        """Give back all memory; the cache is of no use any more."""
        for group in self.groups:
            group.close()
        self._own.clear()
        self._layers, self.states, self.layers = [], None, []

    def commit(self, slot: Tensor, row: Tensor, count: Tensor, advance: Tensor) -> Settle:
        """Write `count` suffix tokens of `row` behind the prefix of `slot` (see `ops.kv_commit`); forget the rest.

        Nothing is written before the result is called: the tokens that lie behind the prefix may still be wanted.
        """
        slot, row, count, advance = (t.to(self.device) for t in (slot, row, count, advance))
        if self._waiting is not None:
            places = [-1] * len(self._waiting)
            for place, opened in enumerate(self._opened):
                places[opened] = place
            (lies,) = to_device([places], self.device)
            row = torch.where(row >= 0, lies[row], row)
        settle_states = None if self.states is None else self.states.commit(slot, row, count, advance, self.held)
        where = [self.lengths, self.offsets, slot, row, count]
        calls = [
            (group, [t.to(group.device) for t in (*where, torch.zeros_like(advance))]) for group in self.groups[1:]
        ]
        calls += [(group, [*where, advance]) for group in self.groups[:1]]  # the last: it moves the lengths
        lengths = None if self.groups else self.lengths.index_add(0, slot, count * advance)

        def settle() -> None:
            for group, arguments in calls:
                ops.kv_commit(group.suffix, group.arena, *arguments)
            if lengths is not None:
                self.lengths.copy_(lengths)
            if settle_states is not None:
                settle_states()
            self.held, self.names = 0, []

        return settle

    @contextmanager
    def prefill(self, slots: list[int], counts: list[int]) -> Iterator[dict[str, Any]]:
        """Forward packed tokens [1, sum(counts)], the next counts[i] of slots[i]; yields the forward's arguments."""
        if len(set(slots)) < len(slots):
            raise ValueError(f"a forward of slots {slots}, expected each once")
        if len(slots) > 1 and not self.packs:
            raise ValueError(f"a forward of {len(slots)} prompts, expected one: this model's prompts are not packed")
        starts, offsets = to_host((self.lengths, self.offsets))
        starts, offsets = [starts[p] for p in slots], [offsets[p] for p in slots]
        slot, added = to_device((slots, counts), self.device)
        self._send()
        if self.states is not None:
            self.states.start(slots[0], starts[0])
        plan = Packed.of(starts, counts, offsets, self.device)
        with self._forward(plan):
            yield self._arguments(plan.positions[None])
        if self.states is not None:
            self.states.keep(slots[0])
        self.lengths.index_add_(0, slot, added)

    @contextmanager
    def extend(self, steps: int, query_len: Tensor | None = None) -> Iterator[dict[str, Any]]:
        """Forward [R, steps] more suffix tokens of the open rows, query_len [R] of them real; yields its arguments."""
        start = self.held
        if start + steps > self.segment_size:
            raise ValueError(f"{start} + {steps} suffix tokens, expected at most segment_size = {self.segment_size}")
        if self.states is not None and not self.states.ready:
            raise ValueError("rows of a model with states go on after a commit, expected a fork before")
        if steps > 1 and self.layout.steps:
            raise ValueError(f"{steps} tokens at once, expected 1: behind a state this model reads one at a time")
        if query_len is None:
            query_len = torch.full_like(self.slot, steps)
        where = torch.arange(start, start + steps, device=self.slot.device)
        with self._forward(Suffix(slice(start, start + steps), where, query_len, query_len + start)):
            yield self._arguments(self._positions(where))
        self.held = start + steps

    @contextmanager
    def extend_at(self, place: Tensor) -> Iterator[dict[str, Any]]:
        """Forward [R, 1] suffix tokens of the open rows, the one at `place` [1]; yields the forward's arguments.

        For CUDA graphs: the place is read by the device alone. The caller sees to it that the tokens before it are
        there and that it is less than segment_size; `held` does not change.
        """
        one = torch.ones_like(self.slot)
        with self._forward(Suffix(place, place, one, one + place)):
            yield self._arguments(self._positions(place))

    def _positions(self, where: Tensor) -> Tensor:
        """[R, S] of the open rows' tokens at `where` [S] of their suffixes."""
        positions = self.lengths[self.slot][:, None] + where
        return positions.clamp_(max=self.layout.limit - 1)  # padding may lie where there are no learned positions

    def read(self, ids: Tensor, count: Tensor, forward: Callable[[Tensor, dict[str, Any]], Tensor]) -> Tensor:
        """Read suffix tokens [R, S] of the open rows, count [R] of them real, in as few forwards as they allow.

        forward: (ids [R, s], the model's arguments) -> [R, s, ...]. Returns [R, S, ...].
        """
        parts, done = [], 0
        for steps in self._strides(ids.shape[1]):
            with self.extend(steps, (count - done).clamp(0, steps)) as inputs:
                parts.append(forward(ids[:, done : done + steps], inputs))
            done += steps
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _strides(self, steps: int) -> list[int]:
        """How many of `steps` more suffix tokens each forward takes."""
        return [steps]

    def _arguments(self, positions: Tensor) -> dict[str, Any]:
        """What the model's forward takes beside its input_ids."""
        arguments: dict[str, Any] = {self.layout.argument: self, "use_cache": True}
        return arguments | {"position_ids": positions} if self.layout.positions else arguments

    @contextmanager
    def _forward(self, plan: Packed | Suffix) -> Iterator[None]:
        self._asked, self._rotation = 0, None
        for place in self._places.values():
            place.plan = plan if place.device == self.device else _moved(plan, place.device)
        try:
            with answered_by(self):
                yield
        finally:
            for place in self._places.values():
                place.plan = None
        if self._asked != len(self._layers):
            raise RuntimeError(
                f"{self._asked} of {len(self._layers)} layers called the stars attention hook in a forward, expected "
                "all of them as in the model's first: its result would be wrong"
            )

    def turn(self, rotation: Rotation, rotate: Rotate) -> tuple[Tensor, Tensor]:
        """Let the attention call that follows turn the queries and keys, where its layer is known to change no more."""
        if self._asked == len(self._layers) or not self._layers[self._asked].rotates:
            return rotate(*rotation)
        self._rotation = rotation
        return rotation.query, rotation.key

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, options: dict[str, Any]
    ) -> Tensor:
        """[B, Hq, S, Dk], [B, Hkv, S, Dk], [B, Hkv, S, Dv] of the new tokens -> [B, S, Hq, Dv]; stores the last two."""
        if self._asked == len(self._layers):
            raise RuntimeError(f"more than {self._asked} layers called the stars attention, which the first did not")
        layer = self._layers[self._asked]
        self._asked += 1
        place = layer.place
        plan = place.plan
        rotation, self._rotation = self._rotation, None
        if rotation is not None and not (query is rotation.query and key is rotation.key):
            raise RuntimeError("a layer attends with queries and keys that it had changed once they were to be turned")
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if isinstance(plan, Suffix):
            if rotation is not None:
                turned = (rotation.cos, rotation.sin, plan.at, layer.keys, layer.values)
                query = ops.call_op("rotary_store", query, key, value, *turned)
            elif layer.stores:
                layer.keys[:, plan.where], layer.values[:, plan.where] = key, value
            return ops.call_op(  # its arguments are right by construction, and this runs thousands of times a second
                "fork_attention", query, layer.keys, layer.values, plan.suffix_len, plan.query_len, layer.arena_keys,
                layer.arena_values, place.offsets, place.lengths, place.slot, scale, mask.window, layer.softcap,
                layer.sinks,
            )  # fmt: skip
        if plan is None:
            raise RuntimeError("the stars attention ran outside ForkCache.prefill or ForkCache.extend")
        check_options(mask, options)
        if rotation is not None:  # first: a row's prefix may be new itself
            arenas = layer.arena_keys[None], layer.arena_values[None]
            query = ops.call_op("rotary_store", query, key, value, rotation.cos, rotation.sin, plan.where, *arenas)
        elif layer.stores:
            layer.arena_keys[plan.where], layer.arena_values[plan.where] = key[0], value[0]
        # One call for all prompts, and copies into rows for it. A CPU, to which calls cost little, takes it too: the
        # copies are less than a hundredth of a forward's work, and what they cost a call per slot would cost again.
        query, value = plan.in_rows(query[0]), plan.in_rows(value[0])
        key = plan.in_rows(key[0]) if rotation is None else plan.in_rows_of(layer.arena_keys)
        attended = ops.fork_attention(
            query, key, value, plan.counts, plan.counts, layer.arena_keys, layer.arena_values, plan.offsets,
            plan.lengths, plan.rows, scale=scale, window=mask.window, softcap=layer.softcap, sinks=layer.sinks,
        )  # fmt: skip
        return plan.end_to_end(attended)[None]

    def _place(self, device: torch.device) -> Place:
        return Place(device, self.offsets.to(device), self.lengths.to(device), self.slot.to(device))

    def _send(self) -> None:
        """Tell the other devices what has changed."""
        for place in self._places.values():
            known = (self.offsets, self.lengths, self.slot)
            place.offsets, place.lengths, place.slot = (tensor.to(place.device) for tensor in known)

    def _bind(self, rows: slice) -> list[BoundLayer]:
        arenas = {plane: iter(group.arena_planes) for plane, group in self._groups.items()}
        suffixes = {plane: iter(group.suffix_planes(rows)) for plane, group in self._groups.items()}
        bound: list[BoundLayer] = []
        for layer in self.layout.layers:
            if layer.source is not None:
                bound.append(replace(bound[layer.source], softcap=layer.softcap, sinks=layer.sinks, stores=False,
                                     rotates=False))  # fmt: skip
                continue
            keys, values = layer.key, layer.value
            storage = next(arenas[keys]), next(arenas[values]), next(suffixes[keys]), next(suffixes[values])
            more = layer.softcap, layer.sinks, True, layer.rotates
            bound.append(BoundLayer(self._places[keys[3]], *storage, *more))
        return bound

    # What transformers asks of a cache. Masks are patterns here, so their sizes do not matter.

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.held

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    @property
    def is_compileable(self) -> bool:
        return False


def _moved(plan: Packed | Suffix, device: torch.device) -> Packed | Suffix:
    if isinstance(plan, Suffix):
        names = ("at", "query_len", "suffix_len")
        return replace(plan, **{name: getattr(plan, name).to(device) for name in names})
    return Packed(**{name: tensor.to(device) for name, tensor in vars(plan).items()})
