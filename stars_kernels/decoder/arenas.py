"""The places for tokens that both models have, and which tokens lie there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from stars_kernels.decoder.prefixes import shared_length

WORTH_COPYING = 32
"""Tokens: with fewer, a prompt had better be read together with others."""


class Arenas:
    """What lies in the arenas of both models: of each answer that has a slot its prompt, and what earlier ones left.

    tokens: places for tokens; 0 = none are known. spare: places to take beyond those that a run needs, so that more of
    what was left stays. texts: by first place, tokens whose keys and values lie there or are about to be read; those
    first that are there longest. Texts of fewer than WORTH_COPYING tokens are not told.
    """

    def __init__(self, enlarge: Callable[[int, int], None] | None = None) -> None:
        """enlarge: of so many places, makes so many more, and what lies there stays; None = nothing stays."""
        self._enlarge = enlarge
        self.tokens = self.spare = 0
        self.texts: dict[int, list[int]] = {}
        self._alike: dict[tuple[int, ...], set[int]] = {}  # first places, by the first tokens

    def put(self, place: int, text: Sequence[int]) -> None:
        """Know that this text lies there, in place of what began at the same place."""
        self.drop(place)
        if len(text) >= WORTH_COPYING:
            self.texts[place] = list(text)
            self._alike.setdefault(tuple(text[:WORTH_COPYING]), set()).add(place)

    def drop(self, place: int) -> None:
        """Forget the text that begins at a place, if one does."""
        if (text := self.texts.pop(place, None)) is not None:
            head = tuple(text[:WORTH_COPYING])
            self._alike[head].discard(place)
            if not self._alike[head]:
                del self._alike[head]

    def grow(self, places: int) -> None:
        """Make ready for more places, where what is known to lie there is to stay; else know of nothing any more."""
        if self.texts and self._enlarge is not None:
            self._enlarge(self.tokens, places)
        else:
            self.forget()

    def forget(self) -> None:
        """Know of no places any more, and so of nothing that lies there."""
        self.tokens = 0
        self.forget_texts()

    def forget_texts(self) -> None:
        """Know of nothing that lies there."""
        self.texts.clear()
        self._alike.clear()

    def longest(self, prompt: Sequence[int], together: Collection[int]) -> tuple[int, int]:
        """Find where the longest beginning of a prompt lies, and its tokens; (0, 0) where none is worth copying.

        together: first places of prompts that would be read with it. To copy from one of them it has to wait, which a
        few tokens more are not worth.
        """
        wanted, best = list(prompt), (0, 0)
        places = sorted(self._alike.get(tuple(wanted[:WORTH_COPYING]), ()))
        for waits in (False, True):
            for place in places:
                text, end = self.texts[place], best[1] + (WORTH_COPYING if waits else 1)
                if (place in together) is waits and end <= len(wanted) and text[:end] == wanted[:end]:
                    best = (place, shared_length(text, wanted))
        return best
