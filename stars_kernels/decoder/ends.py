"""Where candidates end: at an end-of-sequence token, a stop, the plan's size or its entropy; and which are broken."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.memory import is_out_of_memory
from stars_kernels.decoder.protocols import Proposal, Rows
from stars_kernels.decoder.transfer import to_device, to_host


@dataclass
class Ends:
    """Where the candidates of a round end.

    lengths: [R] true tokens of each candidate. broken: [R] whether it holds a -1, or a stop could not be looked for.
    stopped: [R] whether a stop ends it. errors: of the rows whose stop could not be looked for.
    """

    lengths: Tensor
    broken: Tensor
    stopped: Tensor
    errors: dict[int, Exception] = field(default_factory=dict)


def find_ends(
    answers: Mapping[int, Answer],
    rows: Rows,
    proposal: Proposal,
    room: Tensor,
    eos: Tensor,
    entropy: float | None = None,
) -> Ends:
    """Find the ends of candidates.

    Waits for a GPU only where an answer has stops to be looked for.

    Args:
        answers: by slot.
        room: [R] tokens that each row may have.
        eos: [E] end-of-sequence tokens.
        entropy: a bound: a row ends before the first token whose distribution reaches it.
    """
    tokens = proposal.tokens
    size = tokens.shape[1]
    lengths = torch.minimum(_first(is_in(tokens, eos)) + 1, room).clamp(max=size)
    if entropy is not None and proposal.entropies is not None:
        lengths = torch.minimum(lengths, _first(proposal.entropies >= entropy))
    ends = Ends(lengths, torch.zeros_like(lengths, dtype=torch.bool), torch.zeros_like(lengths, dtype=torch.bool))
    if any(answers[slot].find_stop is not None for slot in rows.slots):
        _find_stops(answers, rows, tokens, ends)
    inside = torch.arange(size, device=tokens.device) < ends.lengths[:, None]
    ends.broken = ((tokens < 0) & inside).any(dim=1)
    if ends.errors:
        ends.broken[list(ends.errors)] = True
    return ends


def is_in(tokens: Tensor, eos: Tensor) -> Tensor:
    """Return which tokens are among `eos` [E]. (torch.isin waits for a GPU where these are many.)"""
    return (tokens[..., None] == eos).any(dim=-1)


def _first(found: Tensor) -> Tensor:
    """Return the index of each row's first True in [R, S], S where it has none."""
    return torch.where(found.any(dim=1), found.int().argmax(dim=1), found.shape[1])


def _find_stops(answers: Mapping[int, Answer], rows: Rows, tokens: Tensor, ends: Ends) -> None:
    """Shorten the candidates that a stop ends. An error is kept with its row: it counts only if the row is judged."""
    lengths, candidates = to_host((ends.lengths, tokens))
    for row, (slot, candidate) in enumerate(zip(rows.slots, candidates, strict=True)):
        find_stop = answers[slot].find_stop
        if find_stop is None:
            continue
        decided = [*answers[slot].tokens, *(rows.held[row] if rows.held else ())]
        usable = itertools.takewhile(lambda token: token >= 0, candidate[: lengths[row]])
        try:
            stop = find_stop([*decided, *usable], len(decided))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            ends.errors[row] = error
            continue
        if stop is not None:
            lengths[row], ends.stopped[row] = stop - len(decided), True
    (ends.lengths,) = to_device([lengths], tokens.device)
