#!/usr/bin/env python3
"""Engines behind a gateway, one routing policy after the other, on the same conversations.

    python scripts/bench_gateway.py --engines 4 --policy round-robin cache --json

Starts the engines (the default model, small pools) and one gateway a policy in front of them, and holds conversations through each:
every turn sends the whole history, and conversations share a few system prompts. A cache salt a policy keeps what one has cached
from helping the next. Tells, a policy: prompt tokens computed (those that were not cached, by the engines' own usage), median time
to the first token, time of it all, how even the engines were loaded, and on Linux which share of the machine's cores others had
meanwhile: with more than a few hundredths it is no measurement.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serving.simulator.trace import TraceRequest, write_trace

ROOT = Path(__file__).resolve().parents[1]
WORDS = [
    f"{a}{b}"
    for a in ("time", "hand", "water", "story", "work", "sun", "book")
    for b in ("", "s", " man", " day", " line")
]


def text(rng: random.Random, words: int) -> str:
    """Plain words, about a token each."""
    return " ".join(rng.choice(WORDS) for _ in range(words))


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process of ours, until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", *command, "--log-level", "warning"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()


def ready(process: subprocess.Popen[str], line: str) -> str:
    """Where a process listens, from the line in which it says that it is ready.

    Raises:
        RuntimeError: it ended instead; with its last lines.
    """
    lines: list[str] = []
    assert process.stderr is not None
    for text in process.stderr:
        lines.append(text)
        if found := re.search(line, text):
            return found[1]
    raise RuntimeError(f"it did not become ready:\n{''.join(lines[-10:])}")


AT = r"ready at gRPC ([\d.]+:\d+)"
"""How an engine says where it listens."""


def engine_command(args: argparse.Namespace, *more: str) -> list[str]:
    """What starts a small engine: few slots and pages."""
    return [
        "serving.launch", "--grpc-port", "0", "--no-http", "--no-progress", "--kv-cache-memory", args.kv_cache_memory,
        "--max-model-len", str(args.max_model_len), "--max-num-seqs", "4", "--max-num-batched-tokens", "256",
        *(["--model", args.model] if args.model else []), *more,
    ]  # fmt: skip


def cpu_seconds(*pids: int) -> float:
    """That processes have computed so far, and those that they have started. Linux alone."""
    total, ticks = 0.0, os.sysconf("SC_CLK_TCK")
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += (int(fields[11]) + int(fields[12])) / ticks
            for thread in Path(f"/proc/{pid}/task").iterdir():
                total += cpu_seconds(*map(int, (thread / "children").read_text().split()))
    return total


def machine_seconds() -> tuple[float, float]:
    """(seconds that all cores have had, of them idle) since the machine began. Linux alone."""
    fields = [int(one) for one in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    ticks = os.sysconf("SC_CLK_TCK")
    return sum(fields) / ticks, (fields[3] + fields[4]) / ticks


class Others:
    """Which share of the cores others than this process and those that it has started have had, since this was made."""

    def __init__(self) -> None:
        self._known = sys.platform == "linux"
        self._before = self._now()

    def _now(self) -> tuple[float, float, float]:
        return (*machine_seconds(), cpu_seconds(os.getpid())) if self._known else (0.0, 0.0, 0.0)

    def share(self) -> float | None:
        """0..1; None where that cannot be told."""
        whole, idle, own = (now - before for now, before in zip(self._now(), self._before, strict=True))
        return round(max(0.0, whole - idle - own) / whole, 3) if whole else None


class Talk:
    """Holds the conversations of one run, and counts."""

    def __init__(self, args: argparse.Namespace, url: str, salt: str) -> None:
        self.args, self.url, self.salt = args, url, salt
        self.ttft: list[float] = []
        self.begins: list[float] = []
        self.prompt = self.cached = 0
        self.targets: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.trace: list[TraceRequest] = []
        self._began = self._ended = 0.0

    async def run(self, targets: Sequence[str]) -> dict[str, object]:
        """All conversations, `--concurrency` at a time, after chats that are not counted, with each target and as many at once:
        what is done for the first time takes longer, and a gateway starts a second process for templates when two come at once."""
        import httpx

        rng = random.Random(self.args.seed)
        systems = [text(rng, self.args.system_words) for _ in range(self.args.systems)]
        seeds = [(rng.choice(systems), rng.randrange(2**31)) for _ in range(self.args.conversations)]
        gate = asyncio.Semaphore(self.args.concurrency)
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as web:
            await asyncio.gather(*(self._first(web, i, target) for i, target in enumerate(targets)))
            await asyncio.gather(*(self._first(web, i, targets[0]) for i in range(self.args.concurrency)))
            others, self._began = Others(), time.monotonic()

            async def hold(number: int, system: str, seed: int) -> None:
                async with gate:
                    await self._conversation(web, number, systems.index(system), system, random.Random(seed))

            await asyncio.gather(*(hold(i, *one) for i, one in enumerate(seeds)))
        seconds = self._ended - self._began  # nobody waits for what is thought about the last answer
        counts = [self.targets[name] for name in sorted(self.targets)]
        return {
            "requests": len(self.ttft),
            "seconds": round(seconds, 1),
            "prompt_tokens": self.prompt,
            "computed_prompt_tokens": self.prompt - self.cached,
            "ttft_p50_ms": round(1000 * statistics.median(self.ttft), 1),
            "ttft_p90_ms": round(1000 * statistics.quantiles(self.ttft, n=10, method="inclusive")[-1], 1),
            "requests_by_engine": counts,
            "reasons": dict(self.reasons),
            "others": others.share(),
            **(
                {"ttft_ms": [round(1000 * t) for _, t in sorted(zip(self.begins, self.ttft, strict=True))]}
                if self.args.record
                else {}
            ),
        }

    async def _first(self, web, number: int, target: str) -> None:
        words = text(random.Random(number), self.args.system_words)
        body = {
            "messages": [{"role": "user", "content": words}],
            "max_tokens": 4,
            "cache_salt": f"first {number} {target}",
        }
        headers = {"x-gateway-destination-endpoint": target}
        (await web.post("/v1/chat/completions", json=body, headers=headers)).raise_for_status()

    async def _conversation(self, web, number: int, kind: int, system: str, rng: random.Random) -> None:
        messages = [{"role": "system", "content": system}]
        body = {"messages": messages, "add_generation_prompt": False}
        shared = (await web.post("/tokenize", json=body)).json()["count"]
        prefix: tuple[tuple[int, int], ...] = ((kind, shared),)
        for turn in range(self.args.turns):
            messages.append({"role": "user", "content": text(rng, self.args.message_words)})
            body = {
                "messages": messages, "max_tokens": self.args.max_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
                "stream_options": {"include_usage": True}, "cache_salt": self.salt,
            }  # fmt: skip
            answer, began, first = "", time.monotonic(), 0.0
            async with web.stream("POST", "/v1/chat/completions", json=body, headers={"x-gateway-debug": "1"}) as reply:
                reply.raise_for_status()
                told = dict(part.split("=") for part in reply.headers["x-gateway-decision"].split("; "))
                self.targets[told["target"]] += 1
                self.reasons[told["reason"]] += 1
                async for line in reply.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    for choice in chunk["choices"]:
                        if choice["delta"].get("content"):
                            first = first or time.monotonic()
                            answer += choice["delta"]["content"]
                    if usage := chunk.get("usage"):
                        prompt, output = usage["prompt_tokens"], usage["completion_tokens"]
                        segment = 1_000 * (number + 1) + 2 * turn
                        prefix = (*prefix, (segment, max(1, prompt - sum(n for _, n in prefix))))
                        self.trace.append(TraceRequest(began - self._began, prompt, output, 0, prefix, segment + 1))
                        prefix = (*prefix, (segment + 1, output))
                        self.prompt += usage["prompt_tokens"]
                        self.cached += (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            self.ttft.append((first or time.monotonic()) - began)
            self.begins.append(began - self._began)
            self._ended = max(self._ended, time.monotonic())
            messages.append({"role": "assistant", "content": answer})
            await asyncio.sleep(self.args.think * rng.random() * 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--policy", nargs="+", default=["round-robin", "cache"])
    parser.add_argument(
        "--gateway-flags", nargs=argparse.REMAINDER, default=[], help="further flags of the gateways; comes last"
    )
    parser.add_argument("--model", help="default: the default model")
    parser.add_argument("--kv-cache-memory", default="96MiB", help="of each engine")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--kv-events", action="store_true", help="engines tell of their pages")
    parser.add_argument("--conversations", type=int, default=12)
    parser.add_argument("--concurrency", type=int, default=6)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--systems", type=int, default=4, help="system prompts")
    parser.add_argument("--system-words", type=int, default=250)
    parser.add_argument("--message-words", type=int, default=60)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--think", type=float, default=0.3, help="mean seconds between an answer and the next message")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--record",
        metavar="FILE",
        help="write the last policy's requests as a trace for scripts/simulate.py, and tell the time to each first token",
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    events = ["--kv-events-config", '{"enable_kv_cache_events": true, "publisher": "null"}'] if args.kv_events else []
    engine = engine_command(args, *events)
    with contextlib.ExitStack() as stack:
        targets = [
            ready(stack.enter_context(running(engine)), AT)
        ]  # which compiles what the others then find in the cache
        others = [stack.enter_context(running(engine)) for _ in range(args.engines - 1)]
        targets += [ready(one, AT) for one in others]
        for i, policy in enumerate(args.policy):
            gateway = ["serving.gateway", "--port", "0", "--policy", policy, "--target", *targets]
            gateway += [*(["--model", args.model] if args.model else []), *args.gateway_flags]
            with running(gateway) as process:
                url = ready(process, r"ready at (http://[\d.]+:\d+)")
                talk = Talk(args, url, f"run {i} of {policy}")
                result = asyncio.run(talk.run(targets))
                if args.record:
                    write_trace(args.record, sorted(talk.trace, key=lambda one: one.arrival))
            print(json.dumps({"policy": policy, **result}) if args.json else f"{policy}: {result}", flush=True)


if __name__ == "__main__":
    main()
