"""What streams cost the event loop: real front ends, service and engine thread around a device that only takes time.

CPU milliseconds a step of each thread, over gRPC and over HTTP (server-sent events), and of a gRPC server that does nothing but
write bytes to as many streams: grpc's own share, which nothing above it can make smaller.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc

from benchmarks.host import FakeStep, fake_engine
from benchmarks.report import show
from serving import event_loop

METHOD = "/jaxserve.v1.Inference/Generate"
BENCH = pathlib.Path(__file__).parents[1] / "bench.py"
KINDS = ("grpc", "http", "minimal")
MOST_TOKENS = 4000
SETTLE_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=45.0, help="what the device takes a step")
    parser.add_argument("--seconds", type=float, default=8.0, help="to measure for")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--model", help="whose tokenizer (default: the default model)")
    parser.add_argument("--client", nargs=2, metavar=("KIND", "PORT"), help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    if args.client:
        asyncio.run(_read_streams(args.client[0], int(args.client[1]), args.streams))
        return
    for kind in args.kinds:
        serve = _minimal if kind == "minimal" else _served
        show({"scenario": "frontends", "kind": kind} | event_loop.run(serve(kind, args)), args.json)


async def _served(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    from models.loading.source import resolve
    from serving.boot.startup import Started, load_text_side
    from serving.frontends.app import serve_http
    from serving.frontends.grpc.server import GrpcServer

    engine, runner = fake_engine(args.streams, MOST_TOKENS + 96, args.step_ms / 1e3, asynchronous=True)
    text = load_text_side(resolve(args.model))
    steps, collect = 0, runner.collect

    def collect_words(step: FakeStep) -> Any:
        nonlocal steps
        steps += 1
        result = collect(step)
        for row in range(len(result.tokens)):  # other tokens each time, as a model has
            result.tokens[row] = (row * 37 + steps * 101) % text.tokenizer.vocab_size
        return result

    runner.collect = collect_words  # type: ignore[method-assign]
    engine.loop.start()
    service = Started(engine, text, {}).service()
    grpc_server, http = GrpcServer("127.0.0.1", 0), None
    await grpc_server.start()
    await grpc_server.serve(service)
    port = grpc_server.port
    if kind == "http":
        http = await serve_http(service, port=0)
        port = http.port
    try:
        return await _measure(kind, port, args, lambda: engine.client.num_live, lambda: steps)
    finally:
        await service.abort_all()
        if http is not None:
            await http.stop(0.0)
        await grpc_server.stop(0.0)
        engine.shutdown()


async def _minimal(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """A grpc.aio server without messages to make: every step, 60 bytes to each stream."""
    streams: list[asyncio.Future[None]] = []
    steps = 0

    async def handle(data: bytes, context: Any) -> None:
        while True:
            wake = asyncio.get_running_loop().create_future()
            streams.append(wake)
            await wake
            await context.write(b"x" * 60)

    handlers = {"Generate": grpc.unary_stream_rpc_method_handler(handle, None, None)}  # type: ignore[arg-type]
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(METHOD.split("/")[1], handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def step() -> None:
        nonlocal steps
        while True:
            await asyncio.sleep(args.step_ms / 1e3)
            steps += 1
            waiting = streams[:]
            streams.clear()
            for wake in waiting:
                if not wake.done():  # done: its client has gone
                    wake.set_result(None)

    stepping = asyncio.ensure_future(step())
    try:
        return await _measure(kind, port, args, lambda: len(streams), lambda: steps)
    finally:
        stepping.cancel()
        await server.stop(0.0)


async def _measure(
    kind: str, port: int, args: argparse.Namespace, num_live: Callable[[], int], steps: Callable[[], int]
) -> dict[str, Any]:
    """Starts the client, waits until all streams run, then counts each thread's CPU time a step."""
    protocol = "http" if kind == "http" else "grpc"
    client = await asyncio.create_subprocess_exec(
        sys.executable, BENCH, "frontends", "--client", protocol, str(port), "--streams", str(args.streams)
    )
    try:
        while num_live() < args.streams:
            if client.returncode is not None:
                raise SystemExit("the client ended before its streams began.")
            await asyncio.sleep(0.05)
        await asyncio.sleep(SETTLE_S)
        cpu, count, began = _cpu_by_thread(), steps(), time.perf_counter()
        await asyncio.sleep(args.seconds)
        count, took = steps() - count, time.perf_counter() - began
        spent = {t: 1e3 * (s - cpu.get(t, 0.0)) / count for t, s in _cpu_by_thread().items()}
    finally:
        if client.returncode is None:
            client.kill()
        await client.wait()
    loop = spent.pop(threading.get_native_id())
    engine = sum(spent.pop(t.native_id or 0, 0.0) for t in threading.enumerate() if t.name == "jaxserve-engine")
    return {
        "streams": args.streams,
        "step_ms": round(1e3 * took / count, 1),
        "event_loop_cpu_ms": round(loop, 2),
        "engine_thread_cpu_ms": round(engine, 2),
        "other_threads_cpu_ms": round(sum(spent.values()), 2),
        "event_loop_share_of_step": round(loop * count / (1e3 * took), 4),
    }


def _cpu_by_thread() -> dict[int, float]:
    """Seconds that each thread of this process has had a core, by Linux's schedstat."""
    found = {}
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/schedstat") as file:
                found[int(thread)] = int(file.read().split()[0]) / 1e9
        except OSError:  # it has ended
            continue
    return found


# -- the client, in a process of its own -------------------------------------------------------------------------------


async def _read_streams(protocol: str, port: int, count: int) -> None:
    """Opens the streams and reads them until they end or it is killed."""
    if protocol == "http":
        await asyncio.gather(*(_read_sse(port, i) for i in range(count)))
        return
    from proto.jaxserve.v1 import inference_pb2 as pb

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        generate = channel.unary_stream(METHOD)

        async def read(messages: Any) -> None:
            async for _ in messages:
                pass

        def request(i: int) -> bytes:
            params: Any = {"max_tokens": MOST_TOKENS, "ignore_eos": True}
            return pb.GenerateRequest(text=f"Hello {i}", sampling_params=params).SerializeToString()

        await asyncio.gather(*(read(generate(request(i))) for i in range(count)))


async def _read_sse(port: int, index: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    chat = {
        "messages": [{"role": "user", "content": f"Hello {index}"}],
        "max_tokens": MOST_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    body = json.dumps(chat).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    writer.write(head.encode() + b"\r\n\r\n" + body)
    while await reader.read(65536):
        pass
    writer.close()
