"""Errors that a client sees: an HTTP status and the error object of the OpenAI interface."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """A request that is refused. `param` names the wrong field of the body; `code` is a fixed word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as an HTTP response."""
        return JSONResponse(self.body(), self.status, self.headers)


def failed() -> ApiError:
    """The error for requests on which the engine raised an error."""
    return ApiError(500, "the engine failed on this request; the server's log has the details", code="engine_failed")


def ending() -> ApiError:
    """The error for requests that arrive, or are still running, while the server shuts down."""
    return ApiError(503, "the server is shutting down", code="shutting_down")
