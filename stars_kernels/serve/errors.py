"""What a server answers where it cannot do what it was asked, in the form that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

KINDS = {401: "authentication_error", 429: "rate_limit_error"}
"""Of errors by status; others are the request's below 500, and the server's from there on."""


class ApiError(Exception):
    """A request is not answered.

    status: of HTTP. message: why, in a sentence. param: the key of the body that it is about. code: a word for
    programs. retry_after: seconds after which to ask again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """Return it in OpenAI's form."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the response that tells it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)
