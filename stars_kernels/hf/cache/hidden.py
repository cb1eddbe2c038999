"""The language model's own hidden states, for a reward head that reads them: no second forward.

The hidden state of a token is what the output layer reads there. It is caught at the view's output layer, in a forward
that computes the logits as the model does: these stay exact where a model scales or caps them, which the output layer
by itself, called on a hidden state, would leave out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from stars_kernels.decoder.protocols import Commit, Room, Settle
from stars_kernels.hf.cache.buffers import Buffers


class HiddenStates:
    """The hidden states of the slots, and the logits behind their candidates.

        prompts      [P, D]     at each prompt's last token
        rows         [R, T, D]  at the candidates' tokens
        logits       [R, V]     after the last of them; a candidate that is shorter has ended its answer and needs none
        best_logits  [P, V]     those of the winner, or of the best so far

    `rows` and `logits` stay where they are until there are more rows than ever, so a CUDA graph may write them.
    """

    prompts: Tensor
    rows: Tensor
    logits: Tensor
    best_logits: Tensor
    last: Tensor
    """[B, S, D] what the newest forward computed logits from."""

    def __init__(self, model: PreTrainedModel, buffers: Buffers | None = None) -> None:
        """model: the proposer's view. buffers: where its memory comes from, and stays."""
        self._buffers = Buffers() if buffers is None else buffers
        layer = model.get_output_embeddings()
        if layer is None:
            raise ValueError(f"{type(model).__name__} has no output layer, at which hidden states could be read")
        self._layer: nn.Module = layer

    @contextmanager
    def catch(self) -> Iterator[None]:
        """Leaves in `last` what the output layer read in the block's forward."""
        read: list[Tensor] = []
        # A hook that stayed would keep the layer from being packed, or fused with the draws.
        hook = self._layer.register_forward_pre_hook(lambda layer, inputs: read.append(inputs[0]))
        try:
            yield
        finally:
            hook.remove()
        if len(read) != 1:
            raise RuntimeError(f"the model called its output layer {len(read)} times in a forward, expected once")
        self.last = read[0]

    def reserve(self, room: Room) -> None:
        """Forget all, and take memory for so many slots."""
        self.close()
        self._slots, self._segment_size = room.slots, room.segment

    def admit(self, slot: Tensor, states: Tensor, logits: Tensor) -> None:
        """Take the hidden states [A, D] of the prompts of `slot` [A]; logits: [P, V], those of all slots."""
        if not hasattr(self, "prompts"):
            self.prompts = states.new_empty(self._slots, states.shape[1])
            self.best_logits = self._buffers.take("best logits", tuple(logits.shape), logits.dtype, logits.device)
            self.best_logits = self.best_logits[: self._slots]
            self._empty()
        self.prompts[slot] = states

    def open(self, rows: int) -> None:
        """Room for a round's rows."""
        if rows > self.rows.shape[0]:
            states, logits = self.prompts, self.best_logits
            self._empty()  # first, so that there is room for the new ones
            shape = (rows, self._segment_size, states.shape[1])
            self.rows = self._buffers.take("states", shape, states.dtype, states.device)
            self.logits = self._buffers.take("row logits", (rows, logits.shape[1]), logits.dtype, logits.device)

    def release(self) -> None:
        """Give back the memory of the rows."""
        self._empty()
        for name in ("states", "row logits"):
            self._buffers.drop(name)

    def _empty(self) -> None:
        self.rows = self.prompts.new_empty(0, self._segment_size, self.prompts.shape[1])
        self.logits = self.best_logits.new_empty(0, self.best_logits.shape[1])

    def close(self) -> None:
        """Give back all memory."""
        for name in ("prompts", "rows", "logits", "best_logits", "last"):
            vars(self).pop(name, None)

    @property
    def tensors(self) -> list[Tensor]:
        """The buffers that a segment writes."""
        return [self.rows, self.logits]

    def commit(self, commit: Commit, logits: Tensor) -> Settle:
        """Bring `logits` [P, V], those after the prefixes, up to the segments that become a part of their prefix.

        It shows once the result is called.
        """
        here = (commit.slot,)
        new = self.logits[commit.row.clamp(min=0)].where(commit.row[:, None] >= 0, self.best_logits[here])
        best = self.best_logits.index_put(here, new)
        after = logits.index_put(here, new.where(commit.advance[:, None], logits[here]))

        def settle() -> None:
            self.best_logits.copy_(best)  # in place: graphs read them there
            logits.copy_(after)

        return settle
