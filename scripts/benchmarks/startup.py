"""From process start to ready, and to the first token, with a cold and a warm compile cache."""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.report import show
from benchmarks.work import standard_prompts
from proto.jaxserve.v1 import inference_pb2, inference_pb2_grpc


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeat", type=int, default=1, help="warm starts")
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--skip-cold", action="store_true", help="warm starts only, from the user's own compile cache")
    parser.add_argument("flags", nargs="*", help="flags of serving.launch, after --")


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="jaxserve-bench-") as folder:
        cache = [] if args.skip_cold else ["--compile-cache", folder]
        for i in range(args.repeat + (not args.skip_cold)):
            state = "cold" if i == 0 and not args.skip_cold else "warm"
            show({"cache": state} | start_once([*args.flags, *cache], args.timeout), args.json)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_once(flags: list[str], timeout: float) -> dict[str, float]:
    """Starts a server, asks it for a token, asks again, stops it. Seconds since the process was started."""
    port = free_port()
    command = [sys.executable, "-m", "serving.launch", "--grpc-port", str(port), "--port", str(free_port()), *flags]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.max_reconnect_backoff_ms", 50)]) as channel:
            _wait_ready(channel, process, began + timeout)
            ready = time.perf_counter() - began
            first = _first_token(channel, 1)
            token = time.perf_counter() - began
            later = [_first_token(channel, seed) for seed in range(2, 11)]
    finally:
        process.terminate()
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    return {
        "ready_s": round(ready, 2),
        "first_token_s": round(token, 2),
        "first_request_ttft_s": round(first, 4),
        "tenth_request_ttft_s": round(later[-1], 4),
    }


def _wait_ready(channel: grpc.Channel, process: subprocess.Popen[bytes], deadline: float) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    service = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
    while time.perf_counter() < deadline:
        if process.poll() is not None:
            _, errors = process.communicate()
            raise SystemExit(f"the server ended with code {process.returncode}:\n{errors.decode()[-2000:]}")
        try:
            reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=1)
            if reply.status == health_pb2.HealthCheckResponse.SERVING:
                return
        except grpc.RpcError:
            pass
        time.sleep(0.02)
    raise SystemExit("the server was not ready in time; --timeout allows more.")


def _first_token(channel: grpc.Channel, seed: int) -> float:
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=standard_prompts(1, 32, seed)[0]),
        sampling_params={"max_tokens": 2, "temperature": 0.0, "ignore_eos": True},  # pyright: ignore[reportArgumentType]
    )
    began = time.perf_counter()
    stream = inference_pb2_grpc.InferenceStub(channel).Generate(request)
    next(iter(stream))
    elapsed = time.perf_counter() - began
    for _ in stream:
        pass
    return elapsed
