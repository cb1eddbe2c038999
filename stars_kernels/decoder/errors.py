"""What goes wrong, and what survives it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stars_kernels.decoder.output import StarsOutput


class DecodeError(RuntimeError):
    """One prompt failed on its way. What was raised there, if anything, is its `__cause__`.

    what: failed, in words. index: of the prompt in the call's list. request_id: of the prompt. segment, attempt: where
    in its answer, counted from 0; None = not in one.
    """

    def __init__(
        self,
        message: str,
        *,
        what: str = "",
        index: int | None = None,
        request_id: int | str | None = None,
        segment: int | None = None,
        attempt: int | None = None,
    ) -> None:
        super().__init__(message)
        self.what, self.index, self.request_id, self.segment, self.attempt = what, index, request_id, segment, attempt

    def restated(self, message: str, **where: Any) -> DecodeError:
        """Make an error of this message that says more of where; cause and notes are this one's."""
        known = {name: getattr(self, name) for name in ("what", "index", "request_id", "segment", "attempt")}
        new = DecodeError(message, **(known | where))
        new.__cause__ = self.__cause__
        for note in getattr(self, "__notes__", ()):
            new.add_note(note)
        return new


class Abandoned(Exception):
    """A round is not to go on, as all answers are to end now."""


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


def trace_taken_from(error: BaseException) -> str:
    """Return the end of `error`'s traceback as text, and take the traceback off it, for an error that is kept.

    Its frames, and those that called them, would keep logits and activations alive as long as the error. Where this
    package raised it, the message says all, and the text is empty.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    ours = not frames or str(frames[-1][0].f_globals.get("__name__")).startswith("stars_kernels.")
    text = "" if ours else "".join(traceback.format_tb(error.__traceback__, limit=-8))
    error.__traceback__ = None
    return text


def with_cause(error: Exception, cause: BaseException, trace: str | None = None) -> None:
    """Give `error` its cause, and where that was raised as a note; trace: as text, where it was taken before."""
    error.__cause__ = cause
    if note := trace_taken_from(cause) if trace is None else trace:
        error.add_note(f"Where {type(cause).__name__} was raised:\n{note}")
