"""Replicas under Ray Serve: each runs one server process, and hands HTTP requests to it.

    pip install 'ray[serve]'
    serve run scripts.deploy.ray_serve:app model=Qwen/Qwen3-8B num_replicas=2 num_gpus=1

Arguments that are not Ray's become flags of the server: `max_model_len=8192` is `--max-model-len 8192`. Ray decides where
replicas run, restarts those that fail their health check, and spreads requests; the server does everything else. A
process of its own, because an engine that dies must not take Ray's worker along, and a worker that Ray kills must free
the accelerator.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

RAYS_OWN = ("num_replicas", "num_gpus", "num_cpus", "max_ongoing_requests", "resources")
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "content-length"}
"""Headers that belong to one connection (RFC 9110, section 7.6.1) and are not passed on; the length is counted anew."""


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Flags of `serving.launch` from name=value arguments; true and false are switches that are there or not."""
    found: list[str] = []
    for name, value in arguments.items():
        if name in RAYS_OWN or str(value).lower() == "false":
            continue
        found.append(f"--{name.replace('_', '-')}")
        if str(value).lower() != "true":
            found.append(str(value))
    return found


class Replica:
    """One server process and the way to it.

    Args:
        arguments: see `flags`.
        command: what starts the server; flags are added.
        start_timeout_s: how long weights and compilation may take.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        command: Sequence[str] = (sys.executable, "-m", "serving.launch"),
        start_timeout_s: float = 3600.0,
    ) -> None:
        http, grpc = _free_port(), _free_port()
        where = ["--host", "127.0.0.1", "--port", str(http), "--grpc-port", str(grpc), "--no-progress"]
        self._process = subprocess.Popen([*command, *flags(arguments), *where])
        self._start_timeout_s = start_timeout_s
        self._client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{http}", timeout=None)
        self._ready = False

    async def check_health(self) -> None:
        """Ray's health check: raises when the server is gone or unwell."""
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
            # Its own words would tell of addresses inside, and the health check tells Ray of a server that is gone.
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

    def _check_alive(self) -> None:
        if self._process.poll() is not None:
            raise RuntimeError(f"the server ended with status {self._process.returncode}.")

    def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None and process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)  # it drains, as it does anywhere
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


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


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def app(arguments: dict[str, Any]) -> Any:
    """The application that `serve run` builds from its name=value arguments."""
    from ray import serve

    options = {
        "num_gpus": float(arguments.get("num_gpus", 0)),
        "num_cpus": float(arguments.get("num_cpus", 4)),
    }
    if "resources" in arguments:  # e.g. {"TPU": 4}
        options["resources"] = arguments["resources"]
    deployment = serve.deployment(
        Replica,
        name="jaxserve",
        num_replicas=int(arguments.get("num_replicas", 1)),
        max_ongoing_requests=int(arguments.get("max_ongoing_requests", 1024)),
        ray_actor_options=options,
        graceful_shutdown_timeout_s=90,
    )
    return deployment.bind(dict(arguments))
