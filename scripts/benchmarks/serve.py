"""Drives a running server open-loop at a rate, over gRPC or the OpenAI API: what its clients would feel."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import pathlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from benchmarks.driving import Send, drive
from benchmarks.report import latencies, pyplot, show
from proto.jaxserve.v1 import inference_pb2, inference_pb2_grpc
from serving.simulator.simulate import Outcome
from serving.simulator.trace import (
    GENERATORS,
    Lengths,
    TraceRequest,
    poisson,
    prompt_token_ids,
    read_trace,
    write_trace,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target", default="127.0.0.1:50051", help="host:port (default: %(default)s; with --http :8000)"
    )
    parser.add_argument("--http", action="store_true", help="POST /v1/completions, streamed")
    parser.add_argument("--rate", type=float, nargs="+", default=[1.0], help="requests a second; one run each")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--trace", help=f"{', '.join(GENERATORS)} or a file; default: fixed lengths")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=40_000, help="of the model, where it is smaller than this")
    parser.add_argument("--plot", metavar="PNG", help="latencies against the rate (needs matplotlib)")
    parser.add_argument("--write-trace", metavar="FILE", help="write what was sent, for scripts/simulate.py")


def run(args: argparse.Namespace) -> None:
    if args.http and args.target == "127.0.0.1:50051":
        args.target = "127.0.0.1:8000"
    rows = []
    for rate in args.rate:
        trace = make_trace(args, rate)
        if args.write_trace:
            write_trace(args.write_trace, trace)
        prompts = [[t % args.vocab_size for t in prompt_token_ids(r, i)] for i, r in enumerate(trace)]
        over = over_http if args.http else over_grpc
        outcomes = asyncio.run(over(args.target, trace, prompts))
        rows.append({"protocol": "http" if args.http else "grpc", "rate": rate} | latencies(outcomes))
        show(rows[-1], args.json)
    if args.plot:
        plot(args.plot, rows)


def plot(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Time to first token and time a token against the rate."""
    figure, pair = pyplot().subplots(1, 2, figsize=(8.6, 3.4), dpi=90)
    titles = {"ttft": "time to first token, ms", "tpot": "time a token after it, ms"}
    for axes, (metric, title) in zip(pair, titles.items(), strict=True):
        for quantile in ("p50", "p95"):
            values = [1000 * row[metric][quantile] for row in rows]
            axes.plot([row["rate"] for row in rows], values, marker="o", label=quantile)
        axes.set(xlabel="requests a second", ylabel=title, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def make_trace(args: argparse.Namespace, rate: float) -> list[TraceRequest]:
    """The trace asked for; fixed lengths arrive by Poisson."""
    if args.trace is None:
        fixed = [Lengths(n, 0.0, n, n) for n in (args.prompt_tokens, args.output_tokens)]
        return list(itertools.islice(poisson(rate, *fixed, args.seed), args.requests))
    if args.trace in GENERATORS:
        return list(itertools.islice(GENERATORS[args.trace](rate, args.seed), args.requests))
    if not pathlib.Path(args.trace).is_file():
        raise SystemExit(f"--trace {args.trace}: neither a file nor one of {', '.join(GENERATORS)}.")
    return list(itertools.islice(read_trace(args.trace), args.requests))


async def over_grpc(target: str, trace: Sequence[TraceRequest], prompts: Sequence[Sequence[int]]) -> list[Outcome]:
    """Runs a trace against Inference.Generate."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def send(index: int, request: TraceRequest, prompt: Sequence[int]) -> AsyncIterator[tuple[int, int]]:
            message = inference_pb2.GenerateRequest(
                token_ids=inference_pb2.TokenIds(ids=prompt), priority=request.priority
            )
            message.sampling_params.max_tokens = request.output_tokens
            message.sampling_params.temperature = 0.0
            message.sampling_params.ignore_eos = True
            if request.deadline is not None:
                message.timeout_s = request.deadline
            if request.ttft_deadline is not None:
                message.ttft_timeout_s = request.ttft_deadline
            async for reply in stub.Generate(message):
                yield len(reply.token_ids), reply.usage.cached_tokens

        return await drive(send, trace, prompts)


async def over_http(target: str, trace: Sequence[TraceRequest], prompts: Sequence[Sequence[int]]) -> list[Outcome]:
    """Runs a trace against POST /v1/completions with stream=true, a connection a request."""
    host, port = target.rsplit(":", 1)
    return await drive(http_sender(host, int(port)), trace, prompts)


class HttpError(Exception):
    """An answer other than 200."""

    def __init__(self, status: str, body: str) -> None:
        super().__init__(f"HTTP {status}: {body}")
        self.status = status


def http_sender(host: str, port: int) -> Send:
    """Server-sent events over a bare socket: a client library's own work would be in the figures."""

    async def send(index: int, request: TraceRequest, prompt: Sequence[int]) -> AsyncIterator[tuple[int, int]]:
        body = json.dumps(
            {
                "model": "default",
                "prompt": list(prompt),
                "max_tokens": request.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "priority": request.priority,
            }
        ).encode()
        reader, writer = await asyncio.open_connection(host, port)
        try:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            status = (await reader.readline()).split()
            if len(status) < 2 or status[1] != b"200":
                raise HttpError(b" ".join(status[1:2]).decode(), (await reader.read())[-400:].decode())
            counted = 0
            async for line in reader:  # chunk sizes and headers are lines too: only events are looked at
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                usage = event.get("usage")
                if usage:
                    details = usage.get("prompt_tokens_details") or {}
                    yield usage["completion_tokens"] - counted, details.get("cached_tokens") or 0
                elif event.get("choices"):
                    counted += 1  # an event a token where nothing piles up; the usage at the end corrects the count
                    yield 1, 0
        finally:
            writer.close()

    return send
