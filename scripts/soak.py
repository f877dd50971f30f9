"""Runs a server under mixed load beyond its capacity for as long as you like, and checks that nothing is lost or left behind.

python scripts/soak.py --minutes 30 --json soak.json --plot soak.png
python scripts/soak.py --minutes 5 --launch-flags "--max-num-seqs 16 --max-model-len 1024"

Load: first the capacity is measured, then 1.5 times as much comes in, as a Poisson process: streams over gRPC (greedy and seeded)
and HTTP, urgent ones among them, clients that abort, that vanish in the middle, that read slowly, and that send what is wrong.

Checked, and the exit status is 1 where one fails:
- each stream has exactly the tokens that its last message counts, in order, and as many as were asked for;
- replayed: every token of a greedy stream is the likeliest one behind the tokens before it (a lost or repeated token is not);
- afterwards every page is free and nothing runs;
- resident memory does not grow (slope over the second half), nothing was compiled, no step failed;
- wrong requests got 400, others nothing but an answer, RESOURCE_EXHAUSTED or the deadline that they set.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import pathlib
import random
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import grpc

from proto.jaxserve.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc
from proto.jaxserve.v1 import inference_pb2 as pb
from proto.jaxserve.v1 import sampling_pb2 as sp

KINDS = {
    "greedy": 45, "seeded": 10, "http": 15, "urgent": 5, "abort": 6, "vanish": 5, "slow": 6, "wrong": 8,
}  # fmt: skip
MAX_GAP_NATS = 0.5
"""By how much a greedy token may be less likely than the likeliest one when it is scored again: in other company matrix
products are summed in another order. A token out of place is several nats off."""

MAX_SLOPE_MB_MIN = 2.0
QUEUE = 64
SLOW_S = 0.4
"""Between two reads of a slow client."""
DEADLINE_S = 120.0


@dataclasses.dataclass
class Record:
    """One request as its client saw it."""

    kind: str
    prompt: tuple[int, ...]
    asked: int
    at: float
    tokens: list[int] = dataclasses.field(default_factory=list)
    first_s: float = 0.0
    total_s: float = 0.0
    status: str = "OK"
    problem: str = ""


@dataclasses.dataclass
class Sample:
    """The server at one moment."""

    at: float
    rss_mb: float
    running: int
    waiting: int
    pages_free: int
    tokens: int


class Soak:
    """One run against one server.

    Args:
        grpc_target, http_port: where it listens.
        pid: of its process, for its memory.
        vocab: token ids to draw prompts from.
    """

    def __init__(self, grpc_target: str, http_port: int, pid: int, vocab: int, seed: int) -> None:
        self._channel = grpc.aio.insecure_channel(grpc_target)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._control = control_pb2_grpc.ControlStub(self._channel)
        self._http_port = http_port
        self._pid = pid
        self._vocab = vocab
        self._rng = random.Random(seed)
        self._began = time.monotonic()
        self._shared = [tuple(self._ids(96)) for _ in range(4)]
        self.records: list[Record] = []
        self.samples: list[Sample] = []

    def _ids(self, count: int) -> list[int]:
        low = min(300, self._vocab // 4)  # past the control tokens, where there are so many
        return [self._rng.randrange(low, min(self._vocab, 30_000)) for _ in range(count)]

    def _make(self, kind: str) -> Record:
        stem = self._rng.choice(self._shared) if self._rng.random() < 0.4 else ()
        prompt = (*stem, *self._ids(self._rng.randint(8, 160)))
        return Record(kind, prompt, self._rng.randint(8, 96), time.monotonic() - self._began)

    # -- clients -----------------------------------------------------------------------------------------------------

    async def _one(self, kind: str) -> Record:
        record = self._make(kind)
        self.records.append(record)
        began = time.monotonic()
        try:
            await (self._over_http(record, began) if kind in ("http", "vanish") else self._over_grpc(record, began))
        except grpc.aio.AioRpcError as error:
            record.status = error.code().name
        except (OSError, asyncio.IncompleteReadError) as error:
            record.status, record.problem = "LOST", f"{type(error).__name__}"
        record.total_s = time.monotonic() - began
        self._judge(record)
        return record

    def _request(self, record: Record) -> pb.GenerateRequest:
        params = sp.SamplingParams(max_tokens=record.asked, ignore_eos=True, temperature=0.0)
        if record.kind == "seeded":
            params.temperature, params.seed, params.top_p = 0.8, record.asked, 0.9
        if record.kind == "wrong":
            self._rng.choice(
                (
                    lambda: setattr(params, "top_p", -1.0),
                    lambda: setattr(params, "max_tokens", 10**7),
                    lambda: params.stop_token_ids.append(10**8),
                    lambda: setattr(params.structured_outputs, "regex", "(" * 50),
                )
            )()
        return pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=record.prompt), sampling_params=params, priority=0 if record.kind == "urgent" else 1,
            timeout_s=DEADLINE_S,
        )  # fmt: skip

    async def _over_grpc(self, record: Record, began: float) -> None:
        call = self._inference.Generate(self._request(record))
        stop_at = self._rng.randint(1, record.asked) if record.kind == "abort" else None
        try:
            async for message in call:
                record.first_s = record.first_s or time.monotonic() - began
                record.tokens += message.token_ids
                if record.kind == "slow":
                    await asyncio.sleep(SLOW_S)
                if stop_at is not None and len(record.tokens) >= stop_at:
                    record.status = "ABORTED"
                    return
                if message.finish_reason and message.usage.completion_tokens != len(record.tokens):
                    record.problem = f"{len(record.tokens)} tokens came, {message.usage.completion_tokens} were counted"
        finally:
            call.cancel()

    async def _over_http(self, record: Record, began: float) -> None:
        """A raw client, which can vanish without saying so."""
        body = {
            "model": "default", "prompt": list(record.prompt), "max_tokens": record.asked, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True, "priority": 1, "timeout": DEADLINE_S,
        }  # fmt: skip
        raw = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._http_port)
        try:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n"
            writer.write(head.encode() + b"Connection: close\r\n\r\n" + raw)
            status = int((await reader.readline()).split()[1])
            if status != 200:
                record.status = {429: "RESOURCE_EXHAUSTED", 504: "DEADLINE_EXCEEDED"}.get(status, f"HTTP {status}")
                return
            leave_at = self._rng.randint(1, record.asked) if record.kind == "vanish" else None
            ended = False
            while line := await reader.readline():
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    ended = True
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    record.status = event["error"].get("code") or "error"
                    return
                for choice in event["choices"]:
                    record.first_s = record.first_s or time.monotonic() - began
                    record.tokens += choice.get("token_ids") or ()
                if leave_at is not None and len(record.tokens) >= leave_at:
                    record.status = "VANISHED"
                    writer.transport.abort()
                    return
            if not ended:
                record.problem = "the stream ended without [DONE]"
        finally:
            writer.close()

    def _judge(self, record: Record) -> None:
        allowed = {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "deadline_exceeded", "ABORTED", "VANISHED"}
        if record.kind == "wrong":
            if record.status not in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"):
                record.problem = f"a wrong request got {record.status}"
        elif record.status not in allowed:
            record.problem = record.problem or f"got {record.status}"
        elif record.status == "OK" and len(record.tokens) != record.asked:
            record.problem = record.problem or f"{len(record.tokens)} of {record.asked} tokens"

    # -- the run -----------------------------------------------------------------------------------------------------

    async def capacity(self, seconds: float, width: int) -> float:
        """Requests a second that a closed loop of `width` clients gets answered whole."""
        end = time.monotonic() + seconds
        done = 0

        async def client() -> None:
            nonlocal done
            while time.monotonic() < end:
                if (await self._one("greedy")).status == "OK":
                    done += 1
                else:  # the queue is full: no answer, and no reason to ask again at once
                    await asyncio.sleep(0.1)

        await asyncio.gather(*(client() for _ in range(width)))
        return done / (time.monotonic() - end + seconds)

    async def load(self, rate: float, seconds: float) -> None:
        """Poisson arrivals; returns when the last has its answer."""
        watch = asyncio.create_task(self._watch())
        kinds, weights = list(KINDS), list(KINDS.values())
        tasks: set[asyncio.Task[Record]] = set()
        end = time.monotonic() + seconds
        next_at = time.monotonic()
        while next_at < end:
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))
            task = asyncio.create_task(self._one(self._rng.choices(kinds, weights)[0]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            next_at += self._rng.expovariate(rate)
        await asyncio.gather(*tasks)
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch

    async def _watch(self) -> None:
        while True:
            info = await self.info()
            self.samples.append(
                Sample(
                    round(time.monotonic() - self._began, 2), _rss_mb(self._pid), info.num_running, info.num_waiting,
                    info.num_pages_free, info.generation_tokens,
                )
            )  # fmt: skip
            await asyncio.sleep(1.0)

    async def info(self) -> control_pb2.GetServerInfoResponse:
        return await self._control.GetServerInfo(control_pb2.GetServerInfoRequest())

    async def settle(self, seconds: float = 30.0) -> control_pb2.GetServerInfoResponse:
        """Waits until nothing runs."""
        end = time.monotonic() + seconds
        while True:
            info = await self.info()
            idle = not info.num_running and not info.num_waiting and info.num_pages_free == info.num_pages_total
            if idle or time.monotonic() > end:
                return info
            await asyncio.sleep(0.2)

    async def replay(self, seconds: float) -> tuple[int, int, float]:
        """Scores greedy streams again: (streams, tokens, the largest gap in nats). Those out of place get a `problem`."""
        chosen = [
            r for r in self.records if r.kind in ("greedy", "urgent", "http", "slow", "abort", "vanish") and r.tokens
        ]
        self._rng.shuffle(chosen)
        end, streams, tokens, worst = time.monotonic() + seconds, 0, 0, 0.0
        for start in range(0, len(chosen), 8):
            if time.monotonic() > end:
                break
            group = chosen[start : start + 8]
            for record, gap in zip(group, await asyncio.gather(*map(self._gap, group)), strict=True):
                streams, tokens, worst = streams + 1, tokens + len(record.tokens), max(worst, gap)
                if gap > MAX_GAP_NATS:
                    record.problem = record.problem or f"a token is {gap:.2f} nats from the likeliest"
        return streams, tokens, worst

    async def _gap(self, record: Record) -> float:
        params = sp.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=(*record.prompt, *record.tokens)), sampling_params=params
        )
        async for message in self._inference.Generate(request):
            if message.prompt_logprobs:
                scored = message.prompt_logprobs[len(record.prompt) :]
                return max(entry.top[0].logprob - entry.logprob for entry in scored)
        raise RuntimeError("the server gave no prompt_logprobs")

    async def close(self) -> None:
        await self._channel.close()


def _rss_mb(pid: int) -> float:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def slope(samples: list[Sample]) -> float:
    """MB a minute of the second half, by least squares: start-up's growth (allocators, caches) is over by then."""
    half = samples[len(samples) // 2 :]
    if len(half) < 3:
        return 0.0
    return statistics.linear_regression([s.at for s in half], [s.rss_mb for s in half]).slope * 60


def _p(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else 0.0


def report(
    soak: Soak, rate: float, seconds: float, end: control_pb2.GetServerInfoResponse, replayed: Any
) -> dict[str, Any]:
    """What the run came to."""
    good = [r for r in soak.records if r.status == "OK" and r.kind != "wrong"]
    problems = collections.Counter(f"{r.kind}: {r.problem}" for r in soak.records if r.problem)
    found = {
        "seconds": round(seconds, 1),
        "offered_requests_per_s": round(rate, 2),
        "requests": len(soak.records),
        "by_kind": dict(collections.Counter(r.kind for r in soak.records)),
        "by_status": dict(collections.Counter(r.status for r in soak.records)),
        "tokens": sum(len(r.tokens) for r in soak.records),
        "replayed_streams": replayed[0],
        "replayed_tokens": replayed[1],
        "largest_gap_nats": round(replayed[2], 3),
        "memory_mb": [round(soak.samples[0].rss_mb), round(soak.samples[-1].rss_mb)] if soak.samples else [],
        "memory_slope_mb_per_min": round(slope(soak.samples), 3),
        "recompilations": end.num_recompilations,
        "preemptions": end.num_preemptions,
        "pages_free_of": [end.num_pages_free, end.num_pages_total],
        "running_waiting_at_end": [end.num_running, end.num_waiting],
        "problems": dict(problems),
    }
    for kind in ("greedy", "urgent", "http"):
        of = [r for r in good if r.kind == kind]
        found[f"{kind}_first_token_s_p50_p99"] = [round(_p([r.first_s for r in of], q), 3) for q in (0.5, 0.99)]
        found[f"{kind}_total_s_p50_p99"] = [round(_p([r.total_s for r in of], q), 3) for q in (0.5, 0.99)]
    failures = list(problems)
    if end.num_pages_free != end.num_pages_total or end.num_running or end.num_waiting:
        failures.append("pages or requests are left")
    if end.num_recompilations:
        failures.append("something was compiled")
    if seconds >= 120 and slope(soak.samples) > MAX_SLOPE_MB_MIN:
        failures.append("memory grows")
    found["failures"] = failures
    return found


async def _run(args: argparse.Namespace, ready: re.Match[str], pid: int) -> int:
    target, http_port = f"127.0.0.1:{ready[1]}", int(ready[2])
    async with grpc.aio.insecure_channel(target) as channel:
        model = await control_pb2_grpc.ControlStub(channel).GetModelInfo(control_pb2.GetModelInfoRequest())
    soak = Soak(target, http_port, pid, model.vocab_size, args.seed)
    capacity = await soak.capacity(args.warm_up, model.max_num_seqs + QUEUE // 2)
    soak.records.clear()
    rate, seconds = args.factor * capacity, args.minutes * 60
    print(f"capacity {capacity:.2f} requests/s; offering {rate:.2f} for {seconds:.0f} s", flush=True)
    began = time.monotonic()
    await soak.load(rate, seconds)
    took = time.monotonic() - began
    end = await soak.settle()
    replayed = await soak.replay(args.replay_seconds)
    found = report(soak, rate, took, end, replayed)
    await soak.close()
    print(json.dumps(found, indent=1))
    if args.json:
        _write(soak, found, args.json)
    if args.plot:
        _plot(soak, args.plot)
    return int(bool(found["failures"]))


def _write(soak: Soak, found: dict[str, Any], path: str) -> None:
    full = {**found, "samples": [dataclasses.asdict(s) for s in soak.samples]}
    pathlib.Path(path).write_text(json.dumps(full))


def _plot(soak: Soak, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, sharex=True, figsize=(9, 8))
    at = [s.at for s in soak.samples]
    axes[0].plot(at, [s.rss_mb for s in soak.samples])
    axes[0].set_ylabel("resident memory, MB")
    axes[1].plot(at, [s.running for s in soak.samples], label="running")
    axes[1].plot(at, [s.waiting for s in soak.samples], label="waiting")
    axes[1].set_ylabel("requests")
    axes[1].legend()
    for kind in ("greedy", "urgent"):
        of = [r for r in soak.records if r.kind == kind and r.first_s]
        axes[2].scatter([r.at for r in of], [r.first_s for r in of], s=4, label=kind)
    axes[2].set_ylabel("seconds to the first token")
    axes[2].set_xlabel("seconds")
    axes[2].legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main(argv: list[str] | None = None) -> int:
    """Starts a server, soaks it, stops it. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--factor", type=float, default=1.5, help="of the measured capacity (default: %(default)s)")
    parser.add_argument("--warm-up", type=float, default=15.0, metavar="S", help="seconds of measuring the capacity")
    parser.add_argument("--replay-seconds", type=float, default=60.0, help="for scoring streams again, at most")
    parser.add_argument("--launch-flags", default="", help="further flags of serving.launch, as one word")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="the result, with a sample of the server each second")
    parser.add_argument("--plot", metavar="FILE", help="a picture; needs the extra plot")
    args = parser.parse_args(argv)
    command = [
        sys.executable, "-m", "serving.launch", "--port", "0", "--grpc-port", "0", "--scheduling-policy", "priority",
        "--max-num-queued-reqs", str(QUEUE), "--no-progress", "--log-level", "warning", *shlex.split(args.launch_flags),
    ]  # fmt: skip
    server = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=pathlib.Path(__file__).resolve().parents[1]
    )
    assert server.stderr is not None
    try:
        said = []
        for line in server.stderr:
            said.append(line)
            if ready := re.search(r"ready at gRPC 127\.0\.0\.1:(\d+), http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            print("".join(said), file=sys.stderr)
            return 1
        log = _Drain(server.stderr)
        status = asyncio.run(_run(args, ready, server.pid))
        server.terminate()
        code = server.wait(60)
        errors = [line for line in log.lines if " ERROR " in line or "Traceback" in line]
        if code or errors:
            print(f"the server ended with {code}; errors in its log: {errors[:10]}")
            status = 1
        return status
    finally:
        server.kill()
        server.wait()


class _Drain:
    """Reads a pipe to its end in a thread: a server must not wait for whoever reads its log."""

    def __init__(self, pipe: Any) -> None:
        self.lines: list[str] = []
        threading.Thread(target=lambda: self.lines.extend(pipe), daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
