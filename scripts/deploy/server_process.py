"""One server process and the way to it, for whoever places processes and hands them HTTP requests.

A process of its own, because an engine that dies must not take its owner along, and an owner that is killed must free the
accelerator.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

DRAIN_S = 80.0
"""How long a server may take to end: its own --drain-timeout, and a margin."""
LAST_LINES = 3
"""Of what a server said, for whoever asks why it ended: its owner's error is all that some see of it."""
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "content-length"}
"""Headers that belong to one connection (RFC 9110, section 7.6.1) and are not passed on; the length is counted anew."""


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Flags from name=value arguments; true and false are switches that are there or not."""
    found: list[str] = []
    for name, value in arguments.items():
        if str(value).lower() == "false":
            continue
        found.append(f"--{name.replace('_', '-')}")
        if str(value).lower() != "true":
            found.append(str(value))
    return found


class ServerProcess:
    """One server process and the way to it.

    Args:
        arguments: see `flags`.
        command: what starts the server; flags are added.
        start_timeout_s: how long weights and compilation may take.
        host: where it listens.

    Attributes:
        grpc_address: of its gRPC.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        command: Sequence[str] = (sys.executable, "-m", "serving.launch"),
        start_timeout_s: float = 3600.0,
        host: str = "127.0.0.1",
    ) -> None:
        http, grpc = free_port(), free_port()
        where = ["--host", host, "--port", str(http), "--grpc-port", str(grpc)]
        self._process = subprocess.Popen(
            [*command, *flags(arguments), *where], stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self._said: deque[str] = deque(maxlen=LAST_LINES)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self._start_timeout_s = start_timeout_s
        self._url = f"http://{host}:{http}"
        self._client = httpx.AsyncClient(base_url=self._url, timeout=None)
        self._ready = False
        self.grpc_address = f"{host}:{grpc}"

    async def check_health(self) -> None:
        """Raises when the server is gone or unwell."""
        self._check_alive()
        if self._ready:
            (await self._client.get("/health", timeout=10.0)).raise_for_status()

    async def __call__(self, request: Request) -> Response:
        """Hands a request over and streams the answer back; a caller that hangs up ends the request there too."""
        await self._wait_until_ready()
        headers = _end_to_end(request.headers.items())
        has_body = "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"
        if has_body and "content-length" in request.headers:
            headers["content-length"] = request.headers["content-length"]  # so that what is too long is refused unread
        outgoing = self._client.build_request(
            request.method,
            self._client.base_url.copy_with(raw_path=_target(request)),
            headers=headers,
            content=request.stream() if has_body else None,
        )
        try:
            answer = await self._client.send(outgoing, stream=True)
        except httpx.TransportError as error:
            # Its own words would tell of addresses inside, and the health check tells of a server that is gone.
            text = "The server behind this replica does not answer. Try again."
            error_body = {"message": text, "type": "server_error", "param": None, "code": "unavailable"}
            print(f"the server does not answer: {error!r}", file=sys.stderr, flush=True)
            return JSONResponse({"error": error_body}, 503, headers={"Retry-After": "2"})

        async def body() -> AsyncIterator[bytes]:
            try:
                async for piece in answer.aiter_raw():
                    yield piece
            finally:
                await answer.aclose()

        return StreamingResponse(body(), answer.status_code, _end_to_end(answer.headers.items()))

    async def _wait_until_ready(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._start_timeout_s
        while not self._ready:
            self._check_alive()
            with contextlib.suppress(httpx.TransportError):  # not listening yet
                self._ready = (await self._client.get("/ready", timeout=5.0)).status_code == 200
            if not self._ready:
                if loop.time() > deadline:
                    raise TimeoutError(f"the server was not ready after {self._start_timeout_s:.0f} s.")
                await asyncio.sleep(0.2)

    def wait_here(self) -> None:
        """Blocks until the server is ready.

        Raises:
            RuntimeError: it ended instead.
            TimeoutError: after `start_timeout_s`.
        """
        deadline = time.monotonic() + self._start_timeout_s
        while not self._ready:
            self._check_alive()
            with contextlib.suppress(httpx.TransportError):
                self._ready = httpx.get(f"{self._url}/ready", timeout=5.0).status_code == 200
            if not self._ready:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the server was not ready after {self._start_timeout_s:.0f} s.")
                time.sleep(0.2)

    def end(self) -> None:
        """Has the server drain, as a SIGTERM does anywhere, and waits for its end."""
        process = getattr(self, "_process", None)
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(DRAIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _listen(self) -> None:
        """Passes on what the server says."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            sys.stderr.write(line)
            self._said.append(line.strip())

    def _check_alive(self) -> None:
        if self._process.poll() is not None:
            self._listener.join(1.0)
            said = "".join(f"\n{line}" for line in self._said)
            last = f" It said last:{said}" if said else ""
            raise RuntimeError(f"the server ended with status {self._process.returncode}.{last}")

    def __del__(self) -> None:
        self.end()


def _target(request: Request) -> bytes:
    """The path and query as they came. Not from `request.url`, which is put together with the Host header, whose sender chooses
    it; nor as a URL to be joined, of which `//elsewhere/` names another host."""
    scope = request.scope
    path: bytes = scope.get("raw_path") or urllib.parse.quote(scope["path"], safe="/:@!$&'()*+,;=~").encode()
    prefix = scope.get("root_path", "").encode()
    if prefix and path.startswith(prefix + b"/"):
        path = path[len(prefix) :]
    query = scope.get("query_string", b"")
    return path + b"?" + query if query else path


def _end_to_end(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers if name.lower() not in HOP_BY_HOP}


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
