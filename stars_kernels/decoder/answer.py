"""One prompt's answer while it grows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stars_kernels.decoder.errors import message_of, with_cause
from stars_kernels.decoder.output import Counts, FinishReason, Segment

FindStop = Callable[[list[int], int], int | None]
"""(answer tokens, tokens accepted before) -> answer tokens up to the one that ends the answer, or None."""


@dataclass
class Answer:
    """One prompt on its way."""

    key: int
    prompt: Sequence[int]
    limit: int
    """Tokens the answer may have: the budget, or less where the context ends."""
    find_stop: FindStop | None = None
    tokens: list[int] = field(default_factory=list)
    reward: float = math.nan
    prompt_reward: float = math.nan
    segments: list[Segment] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    kept: list[int] = field(default_factory=list)
    """Tokens of the attempt to keep so far: the winner, or the best of those rejected."""
    kept_stops: bool = False
    """Whether `find_stop` ends the answer with them."""

    @property
    def active(self) -> bool:
        return self.finish_reason is None and self.error is None

    @property
    def room(self) -> int:
        """Tokens the answer may still grow by."""
        return self.limit - len(self.tokens)

    @property
    def segment(self) -> Segment:
        """The segment under decision."""
        if not self.segments or self.segments[-1].outcome != "undecided":
            self.segments.append(Segment())
        return self.segments[-1]

    def fail(self, what: str, cause: Exception | None = None, trace: str | None = None) -> None:
        """End the answer with an error; trace: as in `with_cause`."""
        why = "" if cause is None else f": {type(cause).__name__}: {message_of(cause)}"
        self.error = RuntimeError(f"segment {max(len(self.segments) - 1, 0)}: {what}{why}")
        if cause is not None:
            with_cause(self.error, cause, trace)
