"""The server process: uvicorn, with limits that it lacks, so that slow or many clients cannot hold it up."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import sys
import tempfile
from asyncio import TimerHandle
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

from vouch.errors import VouchError
from vouch.service.config import ServiceConfig
from vouch.service.logs import write_json_logs

WORKER_SECONDS = 60
"""A worker that shows no life for so long is replaced; a busy machine may take most of it to load the libraries."""
STARTUP_FAILED = 3
MAX_HEAD = 1 << 16
"""Most bytes of a request's line and headers."""
FULL_BODY = b'{"error": {"what": "too many connections", "where": null, "hint": "connect again later"}}'
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(FULL_BODY), FULL_BODY)
)
LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Http(HttpToolsProtocol):
    """HTTP/1.1 whose connections are counted, and whose requests' heads must come in time and within a size."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = _limits()
        self._head = 0
        self._timer: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self.connections.discard(self)
            transport.write(FULL)
            transport.close()
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes, while a request's head stays within its size."""
        if self.transport.is_closing():
            return
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()  # another request on a kept connection
        if self._timer is not None:
            self._head += len(data)
        super().data_received(data)
        if self._timer is not None and self._head > MAX_HEAD:
            self._stop_timer()
            self.transport.write(LONG)
            self.transport.close()

    def on_headers_complete(self) -> None:
        """The head is there in time."""
        self._stop_timer()
        super().on_headers_complete()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, even if its client does not read what was sent."""
        self.transport.abort()

    def _expect_head(self) -> None:
        self._head = 0
        self._timer = self.loop.call_later(self.limits.header_seconds, self._too_slow)

    def _too_slow(self) -> None:
        self._timer = None
        self.transport.abort()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


_config: ServiceConfig | None = None


def _limits() -> ServiceConfig:
    """The settings of this process, read once."""
    global _config
    if _config is None:
        _config = ServiceConfig.from_environment()
    return _config


def serve(config: ServiceConfig, *, measure: bool = False, tell: Callable[[str], None] = lambda text: None) -> None:
    """Serve a run until told to stop.

    Args:
        measure: measure the run on its test part first, unless that was done before. tell: is told what goes on.

    Raises:
        VouchError: the run or the database cannot be opened, or the address is taken; found before anything is served.
    """
    from vouch.recommenders.runs import open_run
    from vouch.service.storage import Store

    run = open_run(config.run)
    Store.open(config.database_url, wait_seconds=config.database_seconds).close()
    with bind(config) as address:
        if measure:
            from vouch.service.card import measure_first

            measure_first(run, tell)
        del run  # the workers open it themselves
        host = f"[{config.host}]" if ":" in config.host else config.host
        tell(f"serving {config.run} at http://{host}:{address.getsockname()[1]} (API: /v1/openapi.json)")
        listen(config, "vouch.service.app:from_environment", address)


def bind(config: ServiceConfig) -> socket.socket:
    """The address to listen on, taken.

    Raises:
        VouchError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    taken = socket.socket(family)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((config.host, config.port))
    except OSError as error:
        taken.close()
        hint = (
            "choose another --port, or 0 for a free one" if error.errno == errno.EADDRINUSE else "check --host, --port"
        )
        reason = error.strerror or str(error)
        raise VouchError(f"cannot listen on {config.host}, port {config.port}: {reason}", hint=hint) from None
    taken.set_inheritable(True)
    return taken


def listen(config: ServiceConfig, application: str, address: socket.socket | None = None) -> None:
    """Run the workers until SIGTERM or SIGINT: then no connection is taken any more, requests under way are answered,
    and what was accepted is stored.

    Args:
        application: `module:function` that makes the application from the settings in the environment.
        address: to listen on; that of the settings by default.
    """
    address = address or bind(config)
    os.environ.update(config.to_environment())
    _allow_files(config.max_connections + 256)
    write_json_logs()
    with contextlib.ExitStack() as stack:
        if config.workers > 1 and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="vouch-"))
        settings = uvicorn.Config(
            application,
            factory=True,
            workers=config.workers,
            http="vouch.service.server:Http",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=max(1, int(config.idle_seconds)),
            timeout_worker_healthcheck=WORKER_SECONDS,
            timeout_graceful_shutdown=max(1, int(config.drain_seconds)),
        )
        if config.workers > 1:
            Multiprocess(settings, sockets=[address]).run()
            return
        server = uvicorn.Server(settings)
        with contextlib.suppress(KeyboardInterrupt):  # it has stopped in order, and raises the signal again
            server.run(sockets=[address])
        if not server.started:
            sys.exit(STARTUP_FAILED)


def _allow_files(wanted: int) -> None:
    """Let the process hold that many connections, as far as the system allows."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))
