"""A progress bar that is only ever a display: what goes wrong with it ends the bar, not the work."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

from stars_kernels.decoder.errors import message_of

DELAY = 3.0
"""Seconds before a bar appears."""


class Bar(tqdm):
    """tqdm, whose own `refresh` leaves the lock of all bars taken where drawing raises: other threads then wait on."""

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        with self.get_lock():
            self.display()


class Progress:
    """Show a bar of tokens on work longer than a few seconds; nothing of tqdm is touched where it is not shown."""

    def __init__(self, total: int | None, what: str, shown: bool) -> None:
        """total: tokens, None = not known. what: is done. shown: whether there is to be a bar."""
        self._bar: Bar | None = None
        if shown:
            self._display(lambda: setattr(self, "_bar", Bar(total=total, desc=what, unit="tok", delay=DELAY)))

    def update(self, tokens: int) -> None:
        """Tell of as many more."""
        if (bar := self._bar) is not None:
            self._display(lambda: bar.update(tokens))

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (bar := self._bar) is not None:
            self._display(bar.close)

    def _display(self, draw: Callable[[], object]) -> None:
        try:
            draw()
            return
        except Exception as error:  # a closed pipe, no stderr at all, a display of the caller's own
            why = f"{type(error).__name__}: {message_of(error)}"
        self._bar = None
        warnings.warn(f"the progress bar ends, the work goes on ({why})", RuntimeWarning, stacklevel=4)
