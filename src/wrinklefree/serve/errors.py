"""What a client did wrong, or must wait for, in the words of the OpenAI interface: a status and an error object."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """`param` is the field of the body that is meant; `code` a word that programs look at."""

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
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def ending() -> ApiError:
    """For what is asked, or still under way, while the server shuts down."""
    return ApiError(503, "the server is shutting down", code="shutting_down")
