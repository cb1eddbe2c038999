"""Rows scored in forwards of a bounded size, which shrinks where memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

from stars_kernels.decoder.memory import free_memory, is_out_of_memory

Result = TypeVar("Result")

CHUNK_TOKENS = 16384
"""Tokens of one scoring forward, padding included."""


class Chunks:
    """How many tokens one reward model reads at once; halved, for good, where memory runs out."""

    def __init__(self, tokens: int = CHUNK_TOKENS) -> None:
        self.tokens = tokens

    def run(self, lengths: Sequence[int], forward: Callable[[slice], Result]) -> list[Result]:
        """Call `forward` on runs of rows, in order; lengths: tokens that each row takes.

        A forward of several rows holds at most `tokens` of them, each row as long as the longest. Where one runs out of
        memory, the limit is halved below its size, with a warning; out of memory for one row is an error.
        """
        done: list[Result] = []
        begin = 0
        while begin < len(lengths):
            end = self._end(lengths, begin)
            try:
                done.append(forward(slice(begin, end)))
                begin = end
                continue
            except Exception as error:
                if end - begin == 1 or not is_out_of_memory(error):
                    raise
            # Out here nothing holds the forward's tensors any more: the exception did.
            self._halve((end - begin) * max(lengths[begin:end]))
        return done

    def _end(self, lengths: Sequence[int], begin: int) -> int:
        """Return how far a chunk that starts at row `begin` goes: one row at least."""
        longest, end = lengths[begin], begin + 1
        while end < len(lengths):
            longest = max(longest, lengths[end])
            if longest * (end + 1 - begin) > self.tokens:
                break
            end += 1
        return end

    def _halve(self, failed: int) -> None:
        self.tokens = max(min(self.tokens, failed) // 2, 1)
        free_memory()
        warnings.warn(
            f"out of memory as the reward model read {failed} tokens at once: going on with {self.tokens}; "
            "rewards do not change",
            RuntimeWarning,
            stacklevel=3,
        )
