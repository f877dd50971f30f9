"""Runs the HTTP front end inside an event loop that others share (the gRPC server's)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from serving.access import ServerTls
from serving.frontends.http.connection import bounded_protocol
from serving.frontends.sockets.listening import bind
from serving.service import Limits

logger = logging.getLogger(__name__)


def _worth_telling(record: logging.LogRecord) -> bool:
    """uvicorn calls it an error when replies are cut at a stop, were there any or not; whoever asked for the stop knows."""
    return not str(record.msg).startswith("Cancel %s running task(s)")


logging.getLogger("uvicorn.error").addFilter(_worth_telling)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's tells what nobody has said. That it cuts what still runs when it is stopped is what whoever
    stopped it asked for; it says so as an error, with nothing running too."""
    return "timeout graceful shutdown exceeded" not in record.msg


logging.getLogger("uvicorn.error").addFilter(_is_news)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the process that hosts us."""
        yield


class HttpServer:
    """A running HTTP front end. Made by `serve_app`."""

    def __init__(self, server: _Server, task: asyncio.Task[None], host: str, port: int, scheme: str) -> None:
        self._server = server
        self._task = task
        self.host = host
        self.port = port
        self._scheme = scheme

    @property
    def url(self) -> str:
        """Where it listens, as a URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self._scheme}://{host}:{self.port}"

    async def stop(self, grace_s: float = 5.0) -> None:
        """Closes the port, gives open replies `grace_s` seconds, then drops them."""
        self._server.config.timeout_graceful_shutdown = max(0, round(grace_s))
        self._server.should_exit = True
        await asyncio.wait({self._task}, timeout=grace_s + 1.0)
        if not self._task.done():
            self._server.force_exit = True
            await asyncio.wait({self._task}, timeout=1.0)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def wait(self) -> None:
        """Returns when it has stopped; raises what made it fail."""
        await asyncio.shield(self._task)


async def serve_app(
    app: ASGIApp,
    limits: Limits,
    *,
    host: str,
    port: int,
    tls: ServerTls | None = None,
    sock: socket.socket | None = None,
) -> HttpServer:
    """Starts any ASGI application in the running event loop and returns once it listens.

    Args:
        tls: serve https with these files.
        port: 0 takes a free one; the handle's `port` tells which.
        sock: a socket that is bound already, instead of host and port; see `serving.frontends.sockets.listening`.

    Raises:
        OSError: the port is taken, or the host is not ours.
    """
    sock = sock or bind(host, port)
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,  # our middleware writes it, with request ids
        server_header=False,
        timeout_keep_alive=65,  # longer than the 60 s of common load balancers, which reuse connections
        http=bounded_protocol(limits),
    )
    if tls is not None:
        config.load()
        config.ssl = tls.context()  # our own, whose lowest version is set and which never asks for a password
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[sock]), name="jaxserve-http")
    while not server.started:
        if task.done():
            task.result()
            raise OSError(f"The HTTP server could not start on {host}:{port}.")
        await asyncio.sleep(0.01)
    return HttpServer(server, task, host, sock.getsockname()[1], "https" if tls else "http")
