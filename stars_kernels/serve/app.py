"""The server's routes, and what every request passes before it gets to one."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import stars_kernels
from stars_kernels.decoder.output import Calibration, StarsEvent, StarsOutput
from stars_kernels.hf.engine import Engine
from stars_kernels.serve.answers import DONE, Reply, sent
from stars_kernels.serve.asked import Asked
from stars_kernels.serve.bodies import ChatBody, TextBody, read_body
from stars_kernels.serve.errors import ApiError
from stars_kernels.serve.limits import Limits
from stars_kernels.serve.metrics import Metrics
from stars_kernels.serve.service import Service

log = logging.getLogger("stars_kernels.serve")
FREE = ("/health",)
"""Paths that need no API key."""
COUNTED = ("/v1/chat/completions", "/v1/completions")
"""Paths whose requests are counted."""
HUNG_UP = 499
"""Status that is counted where nobody waited for the answer any more."""
Result = TypeVar("Result")


def make_app(
    engine: Engine,
    *,
    calibration: Calibration | None = None,
    model_name: str | None = None,
    api_key: str | None = None,
    limits: Limits | None = None,
) -> FastAPI:
    """Make the application that serves an engine in OpenAI's protocol; `app.state.service` is its `Service`.

    Args:
        calibration: r* and beta of requests that give none; None = the engine's own settings have them.
        model_name: that requests name; None = the last part of the model's path or hub name.
        api_key: that requests have to bring; None = none.
        limits: None = `Limits()`.

    Raises:
        ValueError: the engine has no tokenizer; its rule needs r* and beta, and there are none; or the calibration was
            made with other models.
    """
    service = Service(engine, calibration, model_name, limits or Limits())
    app = FastAPI(title="stars-kernels", version=stars_kernels.__version__, openapi_url=None)
    app.state.service = service
    app.add_middleware(Gate, metrics=service.metrics, api_key=api_key)
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(HTTPException, _told)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        """Answer a chat."""
        return await _answer(service, request, ChatBody)

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response:
        """Go on with texts."""
        return await _answer(service, request, TextBody)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Name the model that is served."""
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Tell of the model that is served."""
        if name != service.name:
            raise ApiError(404, f"the model {name[:200]!r} is not served, expected {service.name!r}", param="model")
        return _model(service)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Say whether requests are taken on."""
        stopping = service.draining is not None
        return JSONResponse({"status": "stopping" if stopping else "ok"}, 503 if stopping else 200)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Count what was done, for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


class Gate:
    """Asks for the API key, counts requests, and tells what nobody has foreseen."""

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None) -> None:
        self.app, self.metrics = app, metrics
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if scope["path"] in FREE or self._is_allowed(scope):
                await self.app(scope, receive, watched)
            else:
                refusal = ApiError(401, "no API key, or a wrong one: expected it as a bearer", code="invalid_api_key")
                await refusal.response()(scope, receive, watched)
        except ClientDisconnect:
            status = status or HUNG_UP
        except Exception as error:
            log.error("a request failed", exc_info=error)
            if status:
                raise  # its response has begun: the connection is closed, and the client sees that it is cut
            await ApiError(500, f"{type(error).__name__}: {error}").response()(scope, receive, watched)
        finally:
            if scope["path"] in COUNTED:
                self.metrics.ended(status or HUNG_UP, time.monotonic() - began)

    def _is_allowed(self, scope: Scope) -> bool:
        if self._key is None:
            return True
        found = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = found.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)


class EventStream(Response):
    """Server-sent events: of answers, segment by segment. It ends where the client hangs up."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], events: AsyncGenerator[Any, None]) -> None:
        """events: what the chunks are made of; ends with the response, whatever ends this."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.chunks, self.events = chunks, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send(send))
        finally:
            await self.events.aclose()

    async def _send(self, send: Send) -> None:
        async with aclosing(self.chunks) as chunks:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Await `work`, and cancel it where the client hangs up, which raises ClientDisconnect."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()  # type: ignore[return-value]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(service: Service, request: Request, kind: type[Any]) -> Response:
    """Answer a request for answers."""
    service.check_open()
    body = read_body(kind, await _read(request, service.limits))
    asked = service.asked(body)
    usage = bool(body.stream_options and body.stream_options.include_usage)
    reply = Reply(kind is ChatBody, service.name, service.fingerprint, asked.n, usage)
    if not body.stream:
        return JSONResponse(reply.whole(await unless_gone(request.receive, service.outputs(asked))))
    events = service.events(asked)
    first = await unless_gone(request.receive, _next(events))  # what is wrong by then has a status of its own
    return EventStream(_chunks(reply, events, first, asked), events)


async def _next(events: AsyncGenerator[tuple[int, StarsEvent], None]) -> tuple[int, StarsEvent]:
    return await anext(events)


async def _chunks(
    reply: Reply, events: AsyncGenerator[tuple[int, StarsEvent], None], first: tuple[int, StarsEvent], asked: Asked
) -> AsyncGenerator[bytes, None]:
    """Yield the chunks of a stream: one for each segment, one for each answer's end, and its last words."""
    begun, outputs = set[int](), dict[int, StarsOutput]()
    try:
        index, event = first
        while True:
            if event.text or event.token_ids:
                yield sent(reply.piece(index, event, index not in begun))
                begun.add(index)
            if isinstance(event.output, StarsOutput):
                outputs[index] = event.output
                yield sent(reply.end(index, event.output))
            index, event = await anext(events)
    except StopAsyncIteration:
        if reply.usage:
            yield sent(reply.last(outputs[i] for i in range(len(asked))))
    except ApiError as error:
        yield sent(error.body())
    yield DONE


async def _read(request: Request, limits: Limits) -> bytes:
    """Read a body, no more of it than the limit."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the content type is {kind[:100]!r}, expected 'application/json'")
    too_large = ApiError(413, f"the body is too large, expected at most {limits.body_bytes} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and len(length) < 20 and int(length) > limits.body_bytes:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_time):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {limits.body_time} seconds") from None
    return bytes(data)


async def _told(request: Request, error: Exception) -> Response:
    """Tell an error in OpenAI's form."""
    if isinstance(error, ApiError):
        return error.response()
    assert isinstance(error, HTTPException)  # of the router: no such path, or not with this method
    return ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}").response()


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.began, "owned_by": "stars-kernels"}
