"""Requests that come one by one and share the slots of an engine, as those of an application's users do."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch

from stars_kernels.decoder.calibration import is_calibrated
from stars_kernels.decoder.errors import Abandoned, message_of, trace_taken_from, with_cause
from stars_kernels.decoder.output import FinishReason, StarsEvent
from stars_kernels.hf.call import Call, Workspace
from stars_kernels.hf.requests import Request, Told, failure

TURN = 2e-4
"""Seconds that others have to take the engine's lock, between two rounds: it is given to no one in turn."""
MAX_TABLES = 4
"""Runs at once. Each has memory of its own for all its slots, so other settings wait until one of them has ended."""
Context = Callable[[], AbstractContextManager[None]]


class Ticket:
    """A request on its way, with a call of its own."""

    def __init__(self, call: Call, request: Request, tell: Callable[[StarsEvent], None], named: bool) -> None:
        """tell: gets its events, in another thread; the last one has an output. named: whether its id was given."""
        self.call, self.request, self.named, self._tell = call, request, named, tell
        self.told, self.answer, self.ended = Told(call.told), call.answer_to(request), False
        call.results = [None]

    def tell(self, seconds: dict[str, float]) -> None:
        """Tell what is new of the answer, if anything is; seconds: of its run, by phase."""
        event = self.call.event(self.answer, self.told, seconds)
        if event is not None:
            self._end_with(event)

    def fail(self, error: Exception) -> None:
        """Tell that the request ended with an error, if it has not ended."""
        if not self.ended:
            self._end_with(failure(self.call.codec, self.request.index, self.request.id, error))

    def _end_with(self, event: StarsEvent) -> None:
        self.ended = event.output is not None
        self._tell(event)


class Table:
    """A run of tickets of equal settings."""

    def __init__(self, first: Ticket, workspace: AbstractContextManager[Workspace]) -> None:
        """first: what the others are like."""
        self.tickets: list[Ticket] = []
        with ExitStack() as held:
            self._workspace = first.call.workspace = held.enter_context(workspace)
            self._run = first.call.shared_run(first.request, self._stop)
            self._held = held.pop_all()

    def seat(self, ticket: Ticket) -> None:
        """Let a ticket wait for a slot."""
        ticket.call.limits, ticket.call.workspace = self._run.limits, self._workspace
        self.tickets.append(ticket)
        self._run.add(ticket.answer)

    def step(self) -> None:
        """End the tickets that are to end now, and play a round with others."""
        for ticket in self.tickets:
            if (reason := ticket.call.stop()) is not None:
                self._run.drop(ticket.answer, reason)
        self._run.step()
        for ticket in self.tickets:
            ticket.tell(self._run.seconds)
        self.tickets = [ticket for ticket in self.tickets if not ticket.ended]

    def fail(self, error: Exception) -> None:
        """End all tickets with an error."""
        for ticket in self.tickets:
            ticket.fail(error)
        self.tickets = []

    def close(self) -> None:
        """Give the memory and the workspace back."""
        self._run.close()
        self._held.close()

    def _stop(self) -> FinishReason | None:
        """Why all answers that have a slot are to end now; None = one is wanted."""
        seated = {id(answer) for answer in self._run.active.values() if answer.active}
        reasons = [ticket.call.stop() for ticket in self.tickets if id(ticket.answer) in seated]
        return reasons[0] if reasons and None not in reasons else None


class Live:
    """Decodes the tickets of one engine, in a thread that lives while there are any.

    Tickets of equal settings share a run and its slots; runs of other settings take turns with it, a round each. At
    most `MAX_TABLES` are open. A ticket that needs one more waits, and those that came after it wait behind it, also
    for runs that are open: so one of these comes to its end, and no ticket waits for ever.
    """

    def __init__(
        self,
        engine: AbstractContextManager[object],
        exclusive: Context,
        workspace: Callable[[], AbstractContextManager[Workspace]],
    ) -> None:
        """engine: its lock. exclusive: takes it to decode, and raises where the engine is closed.

        workspace: lends one.
        """
        self._engine, self._exclusive, self._workspace = engine, exclusive, workspace
        self._lock = threading.Lock()
        self._arrived: list[Ticket] = []
        self._tables: dict[object, Table] = {}
        self._named: dict[int | str, Ticket] = {}
        self._thread: threading.Thread | None = None

    def join(self, ticket: Ticket) -> None:
        """Let a request join those under way."""
        with self._lock:
            if ticket.named:
                first = self._named.get(ticket.request.id)
                if first is not None and not first.ended and first.call.stop() is None:
                    raise ValueError(
                        f"request id {ticket.request.id!r} is given again while its first request is on its way, "
                        "expected another"
                    )
                self._named = {i: other for i, other in self._named.items() if not other.ended}
                self._named[ticket.request.id] = ticket
            self._arrived.append(ticket)
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(target=self._work, name="stars_kernels", daemon=True)
                thread.start()
                self._thread = thread

    def wait(self) -> None:
        """Wait for the end of the thread, unless this is it."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def load(self) -> tuple[int, int]:
        """Count the tickets that wait for a slot, and those that have one."""
        with self._lock:
            arrived = len(self._arrived)
        seated = [ticket for table in list(self._tables.values()) for ticket in table.tickets if not ticket.ended]
        active = sum(ticket.answer.began is not None for ticket in seated)
        return arrived + len(seated) - active, active

    def _work(self) -> None:
        tables = self._tables
        while True:
            with self._lock:
                arrived = list(self._arrived)
                if not arrived and not tables:
                    self._thread = None
                    self._named.clear()
                    return
            left = self._seat_all(arrived)
            with self._lock:
                self._arrived[: len(arrived)] = left
            for key, table in list(tables.items()):
                try:
                    with self._exclusive(), torch.inference_mode():
                        table.step()
                except BaseException as error:  # the engine was closed; a warning made an error; SystemExit
                    table.fail(_told(error))
                if not table.tickets:
                    del tables[key]
                    try:
                        with self._engine:
                            table.close()
                    except BaseException as error:  # of a broken device: the others go on
                        warnings.warn(f"a run's memory could not be given back: {error}", stacklevel=2)
            time.sleep(TURN)

    def _seat_all(self, arrived: list[Ticket]) -> list[Ticket]:
        """Seat tickets in the order in which they came; returns those that have to wait for a run to end."""
        left: list[Ticket] = []
        for ticket in arrived:
            try:
                if (reason := ticket.call.stop()) is not None:
                    ticket.answer.finish_reason = reason
                    ticket.tell({})
                elif left or not self._seat(ticket):
                    left.append(ticket)
            except BaseException as error:  # of a model, in calibration; the engine was closed; SystemExit
                ticket.fail(_told(error))
        return left

    def _seat(self, ticket: Ticket) -> bool:
        """Let a ticket join the run of its settings; says whether there is one, or room for one more."""
        call, tables = ticket.call, self._tables
        with self._exclusive(), torch.inference_mode():
            if not is_calibrated(call.config):
                with self._workspace() as call.workspace:
                    try:
                        call.use_calibration_of([ticket.request])
                    except Abandoned:
                        ticket.answer.finish_reason = call.stop()
                        ticket.tell({})
                        return True
            key = call.config.replace(seed=None, max_time=None), call.mode.key
            if key not in tables:
                if len(tables) >= MAX_TABLES:
                    return False
                tables[key] = Table(ticket, self._workspace())
            tables[key].seat(ticket)
        return True


def _told(error: BaseException) -> Exception:
    """Return what a request ends with, whose thread nobody waits for; it keeps no frames, and so no tensors."""
    trace = trace_taken_from(error)
    if isinstance(error, Exception):
        if trace:
            error.add_note(f"Where {type(error).__name__} was raised:\n{trace}")
        return error
    ended = RuntimeError(f"the engine's thread met {type(error).__name__}: {message_of(error)}")
    with_cause(ended, error, trace)
    return ended
