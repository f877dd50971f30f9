"""Ten thousand streams at once through one gateway: what they cost, and whether anybody else notices.

python scripts/streams.py --streams 10000

Three processes: an engine that makes a token every few seconds (no model), a gateway over it, and the clients here, of which a
part reads nothing at all. Prints the gateway's memory a stream, the latency of other requests meanwhile, and how long it takes
until all is given back when the clients go. Needs two file descriptors a stream (`ulimit -n`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
BODY = {"model": "default", "prompt": "x" * 32, "max_tokens": 400, "ignore_eos": True, "stream": True}

ENGINE = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from serving import event_loop
from serving.frontends.grpc.server import GrpcServer
from tests.mock_engine import MockEngine, mock_service

async def main():
    engine = MockEngine(reply="word " * 20, step_s=float(sys.argv[2]), max_live=10**6, num_pages=10**6)
    server = GrpcServer(port=0)
    port = await server.start()
    await server.serve(mock_service(engine))
    print(port, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(len(engine.live), flush=True)

event_loop.run(main())
"""
GATEWAY = """
import asyncio, resource, sys
sys.path.insert(0, sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
from serving import event_loop
from serving.frontends.grpc.client import RemoteEngineClient, RemoteGrammars
from serving.frontends.app import serve_http
from serving.gateway import Pool
from serving.metrics import MeteredClient
from serving.service import Limits
from tests.mock_engine import mock_service

async def main():
    client = await RemoteEngineClient.connect(f"127.0.0.1:{sys.argv[2]}", timeout_s=60)
    limits = Limits(stalled_reader_s=float(sys.argv[3]))
    http = await serve_http(mock_service(MeteredClient(Pool([client])), grammar_compiler=RemoteGrammars(), limits=limits), port=0)
    print(http.port, flush=True)
    await asyncio.Event().wait()

event_loop.run(main())
"""


class Child:
    """A process that says a number a line."""

    def __init__(self, code: str, *args: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", code, str(ROOT), *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def number(self, ask: bool = False) -> int:
        assert self.popen.stdin is not None and self.popen.stdout is not None
        if ask:
            self.popen.stdin.write("?\n")
            self.popen.stdin.flush()
        return int(self.popen.stdout.readline())

    def rss_mb(self) -> float:
        fields = pathlib.Path(f"/proc/{self.popen.pid}/statm").read_text().split()
        return int(fields[1]) * resource.getpagesize() / 2**20


async def _open(port: int, gate: asyncio.Semaphore) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream whose first token has come."""
    body = json.dumps(BODY).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    async with gate:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
        writer.write(head.encode() + body)
        status = await reader.readline()
        assert b" 200 " in status, status
        await reader.readuntil(b"data: ")
        return reader, writer


async def _read(reader: asyncio.StreamReader) -> None:
    while await reader.read(4096):
        pass


async def _latency(port: int, path: str, body: dict | None) -> float:
    began = time.monotonic()
    raw = b"" if body is None else json.dumps(body).encode()
    verb = "GET" if body is None else "POST"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"{verb} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + raw)
    status = await reader.readline()
    await reader.read()
    writer.close()
    assert b" 200 " in status, status
    return time.monotonic() - began


async def measure(port: int, gateway: Child, engine: Child, count: int, slow: float) -> dict:
    """Opens `count` streams, of which the share `slow` is not read from; measures; closes all."""
    before = await asyncio.to_thread(gateway.rss_mb)
    gate = asyncio.Semaphore(2000)
    began = time.monotonic()
    streams = await asyncio.gather(*(_open(port, gate) for _ in range(count)))
    opened = time.monotonic() - began
    readers = [asyncio.create_task(_read(reader)) for reader, _ in streams[int(slow * count) :]]
    live = await asyncio.to_thread(engine.number, True)
    health = [await _latency(port, "/health", None) for _ in range(30)]
    tokenize = [await _latency(port, "/tokenize", {"model": "default", "prompt": "hello"}) for _ in range(30)]
    await asyncio.sleep(5.0)
    held = await asyncio.to_thread(gateway.rss_mb)
    began = time.monotonic()
    for _, writer in streams:
        writer.transport.abort()
    while await asyncio.to_thread(engine.number, True):
        if time.monotonic() - began > 120:
            raise RuntimeError("requests of clients that went are still live")
        await asyncio.sleep(0.1)
    freed = time.monotonic() - began
    for task in readers:
        task.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    return {
        "streams": count,
        "live_in_engine": live,
        "opened_in_s": round(opened, 1),
        "gateway_mb_before": round(before),
        "gateway_mb_during": round(held),
        "kb_per_stream": round((held - before) * 1024 / count, 1),
        "health_ms_p50_max": [round(1000 * statistics.median(health), 1), round(1000 * max(health), 1)],
        "tokenize_ms_p50_max": [round(1000 * statistics.median(tokenize), 1), round(1000 * max(tokenize), 1)],
        "all_aborted_after_s": round(freed, 1),
    }


def main(argv: list[str] | None = None) -> int:
    """Prints the result as JSON; 0 when every stream ran and every one was given back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--slow", type=float, default=0.2, help="share of clients that read nothing (default: 0.2)")
    parser.add_argument("--step-s", type=float, default=10.0, help="seconds a token (default: 10)")
    args = parser.parse_args(argv)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < args.streams + 100:
        print(f"{args.streams} streams need as many file descriptors; this machine allows {hard}.", file=sys.stderr)
        return 2
    children = []
    try:
        engine = Child(ENGINE, str(args.step_s))
        children.append(engine)
        gateway = Child(GATEWAY, str(engine.number()), "3600")
        children.append(gateway)
        found = asyncio.run(measure(gateway.number(), gateway, engine, args.streams, args.slow))
    finally:
        for child in children:
            child.popen.kill()
            child.popen.wait()
    print(json.dumps(found, indent=1))
    return int(found["live_in_engine"] < args.streams)


if __name__ == "__main__":
    sys.exit(main())
