"""The requests of a server: how many it takes on, how they are decoded, and how they end."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import torch

import stars_kernels
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.errors import message_of
from stars_kernels.decoder.output import Calibration, StarsEvent, StarsOutput
from stars_kernels.hf.engine import Engine
from stars_kernels.serve.asked import Asked, asked_of, target_of
from stars_kernels.serve.bodies import Body
from stars_kernels.serve.errors import ApiError
from stars_kernels.serve.limits import Limits
from stars_kernels.serve.metrics import Metrics

log = logging.getLogger("stars_kernels.serve")
MAX_RETRY_AFTER = 60
"""Seconds that a client is told to wait, at most."""
Inbox = asyncio.Queue[tuple[int, StarsEvent | ApiError]]
"""Events of the answers of one request, each with the answer's number."""


class Service:
    """An engine and what is under way in it. All of it runs in one event loop."""

    def __init__(self, engine: Engine, calibration: Calibration | None, name: str | None, limits: Limits) -> None:
        """calibration: of requests that give no r* and beta. name: of the model, in requests; None = its own."""
        models = engine.models
        if models.tokenizer is None:
            raise ValueError("the engine has no tokenizer, expected one: a server's answers are text")
        self.engine, self.limits = engine, limits
        self.target = target_of(engine, calibration)
        path = models.lm.config.name_or_path or ""
        self.name = name or path.rstrip("/").rpartition("/")[2] or "model"
        told = (stars_kernels.__version__, torch.__version__, models.fingerprint, models.reward_fingerprint)
        self.fingerprint = f"stars-{hashlib.blake2b(repr(told).encode(), digest_size=6).hexdigest()}"
        self.began = int(time.time())
        self.under_way = 0
        """Answers that were taken on and have not ended."""
        self.draining: float | None = None
        """Since when no request is taken on any more."""
        self._inboxes: set[Inbox] = set()
        self.metrics = Metrics(self.waiting, lambda: engine.load()[1])

    def waiting(self) -> int:
        """Count the answers that were taken on and have no slot yet."""
        return max(0, self.under_way - self.engine.load()[1])

    def asked(self, body: Body) -> Asked:
        """Check a body. Raises ApiError: 404 where it names another model, else as `asked_of`."""
        if body.model != self.name:
            found = body.model[:200]
            raise ApiError(
                404, f"the model {found!r} is not served, expected {self.name!r}", param="model", code="model_not_found"
            )
        return asked_of(body, self.engine, self.target, self.limits)

    def check_open(self) -> None:
        """Raise ApiError with status 503 where the server is told to stop."""
        if self.draining is not None:
            raise ApiError(503, "the server is going down and takes no more requests", code="stopping", retry_after=5)

    async def events(self, asked: Asked) -> AsyncGenerator[tuple[int, StarsEvent], None]:
        """Decode, and yield the events of all answers as they come, each with the answer's number.

        Closing the generator, or cancelling what waits for it, ends all of them and frees their slots.

        Raises:
            ApiError: 429 where too many wait; 400 where a prompt cannot be read; 500 where an answer fails on its way;
                503 where nothing was decided within max_time, or the server goes down. The others end with it.
        """
        self.check_open()
        self._check_room(len(asked))
        inbox = Inbox()
        self._inboxes.add(inbox)
        tasks = [asyncio.create_task(self._follow(i, *one, inbox)) for i, one in enumerate(asked.answers())]
        self.under_way += len(tasks)
        for task in tasks:
            task.add_done_callback(self._forget)
        try:
            left = len(tasks)
            while left:
                index, event = await inbox.get()
                if isinstance(event, ApiError):
                    raise event
                yield index, event
                left -= event.output is not None
        finally:
            self._inboxes.discard(inbox)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def outputs(self, asked: Asked) -> list[StarsOutput]:
        """Decode, and return all answers. Raises as `events`."""
        found: dict[int, StarsOutput] = {}
        async with aclosing(self.events(asked)) as events:
            async for index, event in events:
                if isinstance(event.output, StarsOutput):
                    found[index] = event.output
        return [found[i] for i in range(len(asked))]

    def drain(self) -> None:
        """Take on no more requests; those under way go on."""
        self.draining = time.monotonic() if self.draining is None else self.draining

    def cut(self) -> None:
        """End all requests that are under way."""
        for inbox in self._inboxes:
            inbox.put_nowait((0, ApiError(503, "the server went down before the answer's end", code="stopping")))

    def _check_room(self, more: int) -> None:
        waiting = self.waiting()
        if waiting + more > self.limits.waiting:
            raise ApiError(
                429, f"{waiting} answers wait already, of at most {self.limits.waiting}, and {more} would come",
                code="too_many_waiting",
                retry_after=min(MAX_RETRY_AFTER, math.ceil(self.metrics.typical_seconds)),
            )  # fmt: skip

    def _forget(self, task: asyncio.Task[None]) -> None:
        self.under_way -= 1

    async def _follow(self, index: int, prompt: Any, config: StarsConfig, inbox: Inbox) -> None:
        """Decode one answer, and put its events into the inbox, or what ended it."""
        try:
            async with aclosing(self.engine.astream(prompt, config=config)) as events:
                async for event in events:
                    inbox.put_nowait((index, self._told(event)))
        except (ValueError, TypeError) as error:  # before it began: of its prompt, or of settings that do not fit it
            inbox.put_nowait((index, ApiError(400, message_of(error).removeprefix("prompt 0: "))))
        except Exception as error:
            log.error("a request could not begin", exc_info=error)
            inbox.put_nowait((index, ApiError(500, f"{type(error).__name__}: {message_of(error)}")))

    def _told(self, event: StarsEvent) -> StarsEvent | ApiError:
        """Count an answer that has ended; where it failed, or has nothing, return the error that tells so."""
        output = event.output
        if isinstance(output, Exception):
            log.error("an answer failed: %s", message_of(output), exc_info=output)
            return ApiError(500, message_of(output).replace("prompt 0 ", "", 1), code="decode_error")
        if output is None:
            return event
        self.metrics.answered(output.finish_reason, len(output.token_ids), output.counts)
        if output.finish_reason == "time" and not output.token_ids:
            seconds = output.config.max_time
            return ApiError(
                503, f"no segment was decided within max_time, {seconds} seconds", code="timeout", retry_after=1
            )
        return event
