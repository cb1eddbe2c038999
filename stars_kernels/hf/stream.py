"""A stream of events that any thread may close."""

from __future__ import annotations

import threading
from collections.abc import Generator
from types import TracebackType
from typing import Any

from stars_kernels.decoder.output import StarsEvent


class Stream(Generator[StarsEvent, None, None]):
    """The events of a call, as they come.

    `close` ends the work, also from another thread than the one that waits for the next event, and inside a segment:
    there the stream ends then.
    """

    def __init__(self, events: Generator[StarsEvent, None, None], closing: threading.Event) -> None:
        """closing: a call of which it ends once it is set."""
        self._events, self.closing = events, closing
        self._lock, self._running = threading.RLock(), False

    def send(self, value: None) -> StarsEvent:
        with self._lock:
            self._running = True
            try:
                event = self._events.send(value)
            finally:
                self._running = False
            if self.closing.is_set():
                self._events.close()
                raise StopIteration
            return event

    def throw(self, typ: Any, val: Any = None, tb: TracebackType | None = None) -> StarsEvent:
        with self._lock:
            return self._events.throw(typ) if val is None and tb is None else self._events.throw(typ, val, tb)

    def close(self) -> None:
        self.closing.set()
        with self._lock:
            if not self._running:  # else a reward function of this very call closes it
                self._events.close()
