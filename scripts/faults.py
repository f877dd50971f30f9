"""Breaks a real server on purpose, one fault at a time, and prints what its clients saw as a table.

python scripts/faults.py                       every drill, as the table of docs/reliability.md
python scripts/faults.py --only stall kill     some of them

Each drill starts the server under its supervisor with one fault (`--inject-fault`), runs streams and asks for readiness all the
while, until the server answers again. A stream is lost when it ends with an error or with other tokens than without the fault.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import grpc

from proto.jaxserve.v1 import inference_pb2 as pb
from proto.jaxserve.v1 import inference_pb2_grpc
from proto.jaxserve.v1 import sampling_pb2 as sp

ROOT = pathlib.Path(__file__).resolve().parents[1]
STREAMS = 6
TOKENS = 64
PROMPTS = [tuple(range(1000 + 100 * i, 1012 + 100 * i)) for i in range(STREAMS)]
POISON = 999
WATCHDOG_S = 3.0


@dataclasses.dataclass(frozen=True)
class Drill:
    """One fault.

    Attributes:
        what: for people.
        fault: of `--inject-fault`, or None for faults that clients are.
        flags: further ones of the server.
        clients: what else connects.
    """

    what: str
    fault: str | None = None
    flags: tuple[str, ...] = ()
    clients: str | None = None


DRILLS = {
    "step-error": Drill("a step raises once", "step-error@30"),
    "step-errors": Drill("three steps in a row raise", "step-error@30:3"),
    "poison": Drill("one request makes every step fail that it is in", f"poison:{POISON}"),
    "out-of-memory": Drill("the device has no memory for two steps", "out-of-memory@30:2"),
    "transfer-error": Drill("a step's results cannot be read", "transfer-error@30"),
    "broken-device": Drill("every step fails from one on", "step-error@30:1000000"),
    "slow-step": Drill("a step takes 2 s longer", "slow-step@30:2"),
    "stall": Drill(f"a step never ends (watchdog: {WATCHDOG_S:g} s)", "stall@30"),
    "stuck-loop": Drill(f"the event loop hangs (watchdog: {WATCHDOG_S:g} s)", "stuck-loop@30"),
    "kill": Drill("SIGKILL", "kill@30"),
    "clock-jump": Drill("the wall clock jumps an hour ahead", "clock-jump@30:3600"),
    "clock-jump-back": Drill("the wall clock jumps an hour back", "clock-jump@30:-3600"),
    "disk-full": Drill(
        "no file can grow: caches of programs and all else", "disk-full", ("--compile-cache", "{folder}")
    ),
    "vanish": Drill("clients vanish in the middle of a stream", clients="vanish"),
    "slow-readers": Drill("clients read nothing while their streams run", clients="slow"),
    "half-open": Drill("300 connections that send half a head and no more", clients="half-open"),
}


class Server:
    """A server under its supervisor, whose log is read as it comes."""

    def __init__(self, drill: Drill, folder: str, launch_flags: str) -> None:
        more = [flag.replace("{folder}", folder) for flag in drill.flags]
        if drill.fault is not None:
            more += ["--inject-fault", drill.fault]
        port, http = _free_port(), _free_port()
        command = [
            sys.executable, "-m", "serving.launch", "--supervise", "--grpc-port", str(port), "--port", str(http), "--no-progress",
            "--watchdog-timeout", str(WATCHDOG_S), "--crash-dir", f"{folder}/crashes", *more, *shlex.split(launch_flags),
        ]  # fmt: skip
        self.target, self.http = f"127.0.0.1:{port}", http
        self.lines: list[tuple[float, str]] = []
        self._ready = threading.Semaphore(0)
        self.popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.lines.append((time.monotonic(), line))
            if "ready at" in line:
                self._ready.release()

    def wait_ready(self, seconds: float = 120.0) -> None:
        if not self._ready.acquire(timeout=seconds):
            raise RuntimeError("the server never became ready:\n" + "".join(line for _, line in self.lines[-20:]))

    def first(self, pattern: str, after: float = 0.0) -> float | None:
        """When a line came that matches."""
        return next((at for at, line in self.lines if at >= after and re.search(pattern, line)), None)

    def stop(self) -> int:
        self.popen.send_signal(signal.SIGTERM)
        try:
            return self.popen.wait(30)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            return self.popen.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


async def _stream(stub: Any, prompt: tuple[int, ...]) -> tuple[str, list[int]]:
    """(status, tokens)."""
    params = sp.SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    tokens: list[int] = []
    try:
        async for message in stub.Generate(
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling_params=params)
        ):
            tokens += message.token_ids
    except grpc.aio.AioRpcError as error:
        return error.code().name, tokens
    return "OK", tokens


@contextlib.asynccontextmanager
async def _stub(target: str) -> Any:
    options = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500))
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


async def drill(server: Server, one: Drill, expected: list[list[int]] | None) -> dict[str, Any]:
    """Runs streams through a fault; see the module."""
    async with _stub(server.target) as stub:
        began = time.monotonic()
        with contextlib.ExitStack() as connections:
            if one.clients == "half-open":
                await _half_open(server, connections)
            tasks = [asyncio.create_task(_timed(stub, prompt)) for prompt in PROMPTS]
            if one.fault and one.fault.startswith("poison"):
                tasks.append(asyncio.create_task(_timed(stub, (*PROMPTS[0], POISON))))
            others = [asyncio.create_task(_bad_client(server, one.clients)) for _ in range(8)] if one.clients else []
            results = await asyncio.gather(*tasks)
            recovered = await _until_served(stub)
            await asyncio.gather(*others)
    fault_at = server.first("fault on purpose") or began
    told = [at for status, _, at in results if status != "OK"]
    noticed = server.first(
        r"trying again|engine has been in one step|event loop has not|engine died|was killed", fault_at
    )
    detect = min([at for at in (*told[:1], noticed) if at is not None], default=None)
    own, extra = results[:STREAMS], results[STREAMS:]
    lost = sum(
        status != "OK" or (expected is not None and tokens != expected[i]) for i, (status, tokens, _) in enumerate(own)
    )
    saw = collections.Counter(status for status, _, _ in results)
    ended = re.findall(r"\[supervisor\] the server (.+?) after", "".join(line for _, line in server.lines))
    return {
        "tokens": [tokens for _, tokens, _ in own],
        "saw": ", ".join(f"{count} {name}" for name, count in sorted(saw.items())),
        "detect": None if detect is None else detect - fault_at,
        "recover": recovered - fault_at if (ended or told) else None,
        "lost": lost + sum(status != "OK" for status, _, _ in extra),
        "of": len(results),
        "exit": ended[0] if ended else "lives",
    }


async def _timed(stub: Any, prompt: tuple[int, ...]) -> tuple[str, list[int], float]:
    return (*await _stream(stub, prompt), time.monotonic())


async def _until_served(stub: Any, seconds: float = 90.0) -> float:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        status, _ = await _stream(stub, PROMPTS[0][:4])
        if status == "OK":
            return time.monotonic()
        await asyncio.sleep(0.1)
    raise RuntimeError("the server never came back")


async def _half_open(server: Server, connections: contextlib.ExitStack) -> None:
    for i in range(300):
        port = server.http if i % 2 else int(server.target.rsplit(":", 1)[1])
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" if i % 2 else b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        connections.callback(writer.transport.abort)


async def _bad_client(server: Server, kind: str | None) -> None:
    if kind == "half-open":
        return
    body = b'{"prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": true, "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", server.http, limit=1024)
    writer.write(head % len(body) + body)
    await reader.readuntil(b"data: ")
    if kind == "vanish":
        writer.transport.abort()
        return
    await asyncio.sleep(5.0)  # reads nothing: the socket's buffers fill
    writer.close()


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{max(value, 0.0):.2f}"


def main(argv: list[str] | None = None) -> int:
    """Prints the table. Returns 1 when a drill lost more than its fault explains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(DRILLS), default=list(DRILLS))
    parser.add_argument("--launch-flags", default="--max-num-seqs 8 --max-model-len 512 --max-num-batched-tokens 256")
    args = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    print("| fault | clients saw | detected, s | served again, s | lost | process |\n|---|---|---|---|---|---|")
    expected, wrong = None, False
    fatal = {"broken-device", "stall", "stuck-loop", "kill"}
    for name in ["", *args.only]:
        one = DRILLS[name] if name else Drill("none")
        with tempfile.TemporaryDirectory(prefix="jaxserve-faults-") as folder:
            server = Server(one, folder, args.launch_flags)
            try:
                server.wait_ready()
                found = asyncio.run(drill(server, one, expected))
                reports = len(list(pathlib.Path(folder).glob("crashes/*.json")))
            finally:
                status = server.stop()
        if expected is None:
            expected = found["tokens"]
        allowed = found["of"] if name in fatal else int(name == "poison")
        wrong |= found["lost"] > allowed or status != 0
        process = found["exit"] + (", report written" if reports else "")
        print(
            f"| {one.what} | {found['saw']} | {_seconds(found['detect'])} | {_seconds(found['recover'])} | "
            f"{found['lost']} of {found['of']} | {process} |",
            flush=True,
        )
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
