"""Requests that come one by one and share the slots of an engine, as those of an application's users do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch

from stars_kernels.decoder.calibration import is_calibrated
from stars_kernels.decoder.errors import Abandoned
from stars_kernels.decoder.output import FinishReason, StarsEvent
from stars_kernels.hf.call import Call, Workspace
from stars_kernels.hf.requests import Request, Told, failure

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
        self._held = ExitStack()
        first.call.workspace = self._held.enter_context(workspace)
        self.tickets: list[Ticket] = []
        self._run = first.call.open_run(first.request, self._stop)

    def seat(self, ticket: Ticket) -> None:
        """Let a ticket wait for a slot."""
        self.tickets.append(ticket)
        self._run.waiting.append(ticket.answer)

    def step(self) -> None:
        """End the tickets that are to end now, and play a round with others."""
        for ticket in self.tickets:
            if (reason := ticket.call.stop()) is not None:
                self._run.drop(ticket.answer, reason)
        changed = self._run.step()
        for ticket in self.tickets:
            if not ticket.answer.active or any(ticket.answer is answer for answer in changed):
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

    Tickets of equal settings share a run and its slots; runs of other settings take turns with it, a round each.
    """

    def __init__(self, exclusive: Context, workspace: Callable[[], AbstractContextManager[Workspace]]) -> None:
        """exclusive: lets no other thread decode meanwhile, and raises where the engine is closed.

        workspace: lends one.
        """
        self._exclusive, self._workspace = exclusive, workspace
        self._lock = threading.Lock()
        self._arrived: list[Ticket] = []
        self._named: dict[int | str, Ticket] = {}
        self._thread: threading.Thread | None = None

    def join(self, ticket: Ticket) -> None:
        """Let a request join those under way."""
        with self._lock:
            if ticket.named:
                first = self._named.get(ticket.request.id)
                if first is not None and not first.ended:
                    raise ValueError(
                        f"request id {ticket.request.id!r} is given again while its first request is on its way, "
                        "expected another"
                    )
                self._named[ticket.request.id] = ticket
            self._arrived.append(ticket)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="stars_kernels", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Wait for the end of the thread, unless this is it."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _work(self) -> None:
        tables: dict[object, Table] = {}
        while True:
            with self._lock:
                arrived, self._arrived = self._arrived, []
                if not arrived and not tables:
                    self._thread = None
                    self._named.clear()
                    return
            for ticket in arrived:
                try:
                    self._seat(ticket, tables)
                except Exception as error:  # of a model, in calibration; the engine was closed
                    ticket.fail(error)
            for key, table in list(tables.items()):
                try:
                    with self._exclusive(), torch.inference_mode():
                        table.step()
                except Exception as error:  # the engine was closed; a warning that was made an error
                    table.fail(error)
                if not table.tickets:
                    table.close()
                    del tables[key]
            time.sleep(0)  # others that wait for the engine have their turn

    def _seat(self, ticket: Ticket, tables: dict[object, Table]) -> None:
        call = ticket.call
        with self._exclusive(), torch.inference_mode():
            if not is_calibrated(call.config):
                with self._workspace() as call.workspace:
                    try:
                        call.use_calibration_of([ticket.request])
                    except Abandoned:
                        ticket.answer.finish_reason = call.stop()
                        ticket.tell({})
                        return
            key = call.config.replace(seed=None, max_time=None), call.mode.key
            if key not in tables:
                tables[key] = Table(ticket, self._workspace())
            tables[key].seat(ticket)
