"""Two gateways, real processes, over four engines, with keys and rates in a Redis: a real one where it is installed."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import threading

import fakeredis
import httpx
import pytest
import redis

from serving.access.keys import Role, file_line, new_secret
from serving.access.shared import KEYS
from serving.frontends.grpc.server import GrpcServer
from tests.mock_engine import MockEngine, mock_service
from tests.serving.processes.test_two_processes import Process, free_port
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.slow
RATE = 12


class GatewayProcess(Process):
    """As `Process`, of a gateway."""

    module = "serving.gateway"


class Redis:
    """One that can be stopped and started at its port; without what it held."""

    def __init__(self) -> None:
        self.port = free_port()
        self._server = shutil.which("redis-server")
        self._stop = lambda: None

    def start(self) -> None:
        if self._server is not None:
            process = subprocess.Popen(
                [self._server, "--port", str(self.port), "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL
            )  # fmt: skip
            self._stop = lambda: (process.kill(), process.wait())
        else:
            server = fakeredis.TcpFakeServer(("127.0.0.1", self.port))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            self._stop = lambda: (server.shutdown(), server.server_close())
        client = redis.Redis(port=self.port)
        for _ in range(100):
            with contextlib.suppress(redis.ConnectionError):
                client.ping()
                return
            threading.Event().wait(0.05)

    def stop(self) -> None:
        self._stop()
        self._stop = lambda: None


@contextlib.asynccontextmanager
async def four_engines():
    """Their addresses."""
    servers, addresses = [], []
    for _ in range(4):
        server = GrpcServer("127.0.0.1", 0)
        addresses.append(f"127.0.0.1:{await server.start()}")
        await server.serve(mock_service(MockEngine(reply="ab")))
        servers.append(server)
    try:
        yield addresses
    finally:
        for server in servers:
            await server.stop(0.0)


async def test_keys_and_rates_hold_over_gateways_and_redis_may_go(tmp_path):
    model, store = write_tiny_checkpoint(tmp_path / "model"), Redis()
    store.start()
    secret = new_secret()
    _, role, digest = file_line("alice", Role.USER, secret).split()
    put = lambda: redis.Redis(port=store.port).hset(KEYS, "alice", f"{role} {digest}")  # noqa: E731
    put()
    async with four_engines() as addresses:
        urls, processes = [], []
        for _ in range(2):
            flags = ("--model", str(model), "--port", "0", "--requests-per-minute", str(RATE), "--redis-keys")
            where = ("--redis-url", f"redis://127.0.0.1:{store.port}/0", "--target", *addresses)
            processes.append(GatewayProcess(*flags, *where))
        try:
            urls = [(await asyncio.to_thread(one.wait_for, r"ready at (http://[\d.]+:\d+)"))[1] for one in processes]

            async def ask(number, key=secret):
                async with httpx.AsyncClient(timeout=30, headers={"Authorization": f"Bearer {key}"}) as web:
                    body = {"prompt": "w5 w6", "max_tokens": 1}
                    return (await web.post(f"{urls[number % 2]}/v1/completions", json=body)).status_code

            assert [await ask(i, "nobody's") for i in range(2)] == [401, 401]
            seen = [await ask(i) for i in range(2 * RATE)]
            assert seen[:RATE] == [200] * RATE and seen.count(429) >= RATE - 1, "twelve a minute, whichever is asked"
            store.stop()
            # Each counts alone now, from what it has let through; the key is still known, and another still is not.
            seen = [await ask(i) for i in range(2 * RATE)]
            assert set(seen) <= {200, 429} and 200 in seen and 429 in seen and seen.count(200) <= RATE + 2
            assert await ask(0, "nobody's") == 401
            store.start()
            put()
            await asyncio.sleep(1.5)
            assert [await ask(i) for i in range(2)] == [200, 200], "it counts anew: what it knew is gone with it"
            assert all(process.popen.poll() is None for process in processes)
        finally:
            for process in processes:
                process.popen.kill()
                process.popen.wait()
            store.stop()
