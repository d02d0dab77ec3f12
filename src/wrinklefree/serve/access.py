"""Who may use the server: the API key, and what browsers may do on behalf of pages that their users visit.

A page of a stranger can send requests to servers on the user's own machine. Three checks keep it out:

| check | keeps out |
|---|---|
| bodies must be `application/json` | pages of other sites, which need the server's leave (CORS) to send this type |
| `Host` must name this machine, on loopback | sites whose name is made to point to this machine (DNS rebinding) |
| CORS only for origins that are listed | pages that would read answers |
"""

import hmac
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from wrinklefree.serve.errors import ApiError

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
METHODS = ("GET", "POST", "OPTIONS")


@dataclass(frozen=True)
class Access:
    """The rules of one server."""

    api_key: str | None = None
    origins: tuple[str, ...] = ()  # whose pages may use it, such as https://example.com; `*` means all
    hosts: frozenset[str] | None = None  # names that `Host` may have; None means any
    page: bool = True  # whether `/` is a page to chat on

    def middleware(self) -> list[Middleware]:
        """The checks that come before the routes."""
        origins = list(self.origins)
        cors = Middleware(CORSMiddleware, allow_origins=origins, allow_methods=METHODS, allow_headers=["*"])
        return [*([cors] if origins else []), Middleware(_Guard, hosts=self.hosts)]

    def check_key(self, request: Request) -> None:
        """Raise ApiError 401 if the server has a key and the request lacks it."""
        header = request.headers.get("authorization", "").encode()
        if self.api_key is not None and not hmac.compare_digest(header, f"Bearer {self.api_key}".encode()):
            raise ApiError(401, "no valid API key: send it as `Authorization: Bearer KEY`", code="invalid_api_key")


ANYONE = Access()


def check_type(request: Request) -> None:
    """Raise ApiError 415 if the body is not said to be JSON."""
    stated = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if stated != "application/json":
        text = f"the body's type is {stated[:50] or 'missing'}: send `Content-Type: application/json`"
        raise ApiError(415, text, code="unsupported_media_type", headers={"Connection": "close"})


class _Guard:
    """Refuses requests to other hosts, and answers OPTIONS."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answer(scope) if scope["type"] == "http" else None
        await (answer or self.app)(scope, receive, send)

    def _answer(self, scope: Scope) -> Response | None:
        """The response to a request that goes no further."""
        name = _host_name(Headers(scope=scope).get("host", ""))
        if self.hosts is not None and name not in self.hosts:
            text = f"this server is not {name[:100]!r}: it answers to {', '.join(sorted(self.hosts))}"
            return ApiError(403, text, code="wrong_host").response()
        return (
            Response(status_code=204, headers={"Allow": ", ".join(METHODS)}) if scope["method"] == "OPTIONS" else None
        )


def _host_name(host: str) -> str:
    """The name in a `Host` header, without its port."""
    if host.startswith("["):  # [::1]:8000
        name, _, port = host[1:].partition("]")
        return name if not port or port.startswith(":") else host
    return host.partition(":")[0].lower()
