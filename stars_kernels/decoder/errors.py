"""What goes wrong, and what survives it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stars_kernels.decoder.output import StarsOutput


class StarsError(RuntimeError):
    """Some prompts of a list failed; the others are done.

    results: one entry a prompt, its StarsOutput or the exception that ended it. errors: {prompt index: exception}.
    """

    def __init__(self, results: list[StarsOutput | Exception]) -> None:
        self.results = results
        self.errors = {i: r for i, r in enumerate(results) if isinstance(r, Exception)}
        listed = "\n".join(f"  {error}" for error in self.errors.values())  # each names its prompt
        super().__init__(
            f"{len(self.errors)} of {len(results)} prompts failed; .results has one entry a prompt:\n{listed}"
        )

    def __reduce__(self) -> tuple[type[StarsError], tuple[list[StarsOutput | Exception]]]:
        return type(self), (self.results,)  # not the message, as an exception is pickled by default


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and what it was raised from, explicitly, each once: a chain may end where it began."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and not any(link is known for known in seen):
        yield link
        seen.append(link)
        link = link.__cause__


def message_of(error: BaseException) -> str:
    """Return what `error` says, also where its own __str__ fails."""
    try:
        return str(error)
    except Exception as failure:
        return f"(its message cannot be read: {type(failure).__name__})"


def without_our_frames(error: Exception) -> Exception:
    """Cut this package's frames off the start of `error`'s traceback, for an error that is kept; returns it.

    They hold caches, for as long as the error lives. The frames of the function that raised it stay as they are.
    """
    trace = error.__traceback__
    while trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("stars_kernels."):
        trace = trace.tb_next
    return error.with_traceback(trace)


def traceback_of(error: BaseException) -> str:
    """Return the end of `error`'s traceback as text, which holds no tensors as its frames do."""
    return "".join(traceback.format_tb(error.__traceback__, limit=-8))
