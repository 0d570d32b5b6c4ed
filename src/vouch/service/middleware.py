"""What every request passes first: limits, security headers, one log line, one count.

Bodies are read whole, within a size and a time, before the application sees the request: it never waits for a slow
client, and nothing of a request that breaks off is acted upon.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vouch.service.config import ServiceConfig
from vouch.service.logs import log
from vouch.service.metrics import Metrics
from vouch.service.problems import problem

CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'; "
    "form-action 'self'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
QUIET = ("/healthz", "/readyz", "/metrics")


class Front:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, config: ServiceConfig, metrics: Metrics) -> None:
        self.app, self.config, self.metrics = app, config, metrics
        self.hosts = frozenset(config.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, id = time.perf_counter(), secrets.token_hex(8)
        # A HEAD is answered as a GET whose body the server leaves out: load balancers and link checkers ask so.
        asked = scope["method"]
        scope = {**scope, "method": "GET" if asked == "HEAD" else asked}
        scope["state"] = {**scope.get("state", {}), "request_id": id}
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                named = {name for name, _ in message["headers"]}
                extra = [(name, value) for name, value in RAW_HEADERS if name not in named]
                if b"cache-control" not in named:
                    extra.append((b"cache-control", b"no-store"))
                message = {**message, "headers": [*message["headers"], *extra, (b"x-request-id", id.encode())]}
            await send(message)

        try:
            await self._pass(scope, receive, answer)
        except Exception:
            log.exception("failed", extra={"facts": {"request": id, "route": route_of(scope)}})
            if status == 0:
                response = problem(500, "something went wrong in the service", None, f"its log tells more of {id}")
                await response(scope, receive, answer)
        finally:
            self._note({**scope, "method": asked}, id, status, time.perf_counter() - begun)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "*" not in self.hosts and _host(scope) not in self.hosts:
            await self._refuse("host", 400, "this service does not go by that host name", scope, receive, send)
            return
        length = _header(scope, b"content-length")
        if length.isdigit() and len(length) < 20 and int(length) > self.config.max_body:
            await self._refuse("size", 413, self._too_large(), scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.config.header_seconds):
                body = await self._body(receive)
        except TimeoutError:
            await self._refuse("slow", 408, "the body did not arrive in time", scope, receive, send)
            return
        if body is None:
            return  # the client went away
        if len(body) > self.config.max_body:
            await self._refuse("size", 413, self._too_large(), scope, receive, send)
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    async def _body(self, receive: Receive) -> bytes | None:
        """The body, or a little more than is allowed of it; None if the client went away."""
        parts: list[bytes] = []
        size = 0
        while size <= self.config.max_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if not message.get("more_body", False):
                break
        return b"".join(parts)

    def _too_large(self) -> str:
        return f"the body is larger than {self.config.max_body:,} bytes"

    async def _refuse(self, reason: str, status: int, what: str, scope: Scope, receive: Receive, send: Send) -> None:
        self.metrics.refused.labels(reason).inc()
        headers = {"Connection": "close"} if scope.get("http_version") == "1.1" else None
        hint = "whoever runs the service names its hosts: --set hosts=NAME,NAME" if reason == "host" else None
        await problem(status, what, hint=hint, headers=headers)(scope, receive, send)

    def _note(self, scope: Scope, id: str, status: int, seconds: float) -> None:
        route = route_of(scope)
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        if route not in QUIET:
            facts: dict[str, Any] = {
                "request": id,
                "method": scope["method"] if scope["method"] in METHODS else "OTHER",
                "route": route,
                "status": status,
                "ms": round(1000 * seconds, 2),
                "key": scope["state"].get("key_id"),
            }
            log.info("request", extra={"facts": facts})


METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")


def route_of(scope: Scope) -> str:
    """The pattern of the route that answers, never the path that was asked: a path may hold anything."""
    return getattr(scope.get("route"), "path", None) or "none"


def request_id(request: Request) -> str:
    """The id of a request, which is in its answer and its log line."""
    return str(request.scope["state"]["request_id"])


def _header(scope: Scope, wanted: bytes) -> str:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == wanted), "")


def _host(scope: Scope) -> str:
    """The host a request names, without its port."""
    named = _header(scope, b"host")
    if named.startswith("["):
        return named.partition("]")[0] + "]"
    return named.partition(":")[0].lower()
