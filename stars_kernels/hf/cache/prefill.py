"""How prompts are packed into the forwards that read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from stars_kernels.hf.cache.fork import ForkCache

PREFILL_TOKENS = 1024
"""Prompt tokens of one packed forward."""
PREFILL_PIECES = 64
"""Prompts of one packed forward, at most: attention pads each to rows of as many queries as it reads at once."""


@dataclass
class Chunk:
    """One packed forward: the next counts[i] tokens of slots[i]'s prompt, one after the other in `ids`."""

    slots: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    """The slots whose prompt's last token is in here."""
    last: list[int] = field(default_factory=list)
    """Where in `ids` that token is."""


def packed_chunks(prompts: Mapping[int, Sequence[int]], cache: ForkCache) -> Iterator[Chunk]:
    """Pack slots' prompts into forwards of at most PREFILL_TOKENS and PREFILL_PIECES, as far as `cache` allows.

    A prompt is cut by its own length alone, so that its rounding does not depend on what it is packed with.
    """
    chunk = Chunk()
    for p, prompt in prompts.items():
        size = PREFILL_TOKENS if cache.cuts else len(prompt)
        for begin in range(0, len(prompt), size):
            piece = prompt[begin : begin + size]
            full = len(chunk.ids) + len(piece) > PREFILL_TOKENS or len(chunk.slots) == PREFILL_PIECES
            if chunk.ids and (full or not cache.packs):
                yield chunk
                chunk = Chunk()
            chunk.slots.append(p)
            chunk.counts.append(len(piece))
            chunk.ids += piece
        chunk.finished.append(p)
        chunk.last.append(len(chunk.ids) - 1)
    if chunk.ids:
        yield chunk
