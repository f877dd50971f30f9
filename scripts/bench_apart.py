#!/usr/bin/env python3
"""Inter-token times of running streams while long prompts arrive: prefill and decode apart, against one engine on the same cores.

    python scripts/bench_apart.py --mode both apart --json

`both` is one engine on all of `--cores`; `apart` is an engine that prefills on half of them and one that decodes on the other half.
A gateway is in front either way. Streams of short prompts run all the time; meanwhile prompts of `--prompt-tokens` arrive one after
the other, each with a few tokens to answer. Tells the gaps between the streams' chunks and the long prompts' time to first token,
and of `apart` what came from the engine that prefills: a run of it is one only if `fetched_tokens` is the long prompts' tokens.
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
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.bench_gateway import ready, running, text

WORDS_A_TOKEN = 0.605
"""Of the default model's tokenizer on such text."""
AT = r"ready at gRPC ([\d.]+:\d+)"


@contextlib.contextmanager
def on_cores(cores: list[int]):
    """What is started inside runs on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


async def measure(args: argparse.Namespace, url: str, salt: str) -> dict[str, object]:
    """Runs the load; gaps in seconds."""
    import httpx

    rng, gaps, firsts = random.Random(args.seed), [], []
    busy, over = asyncio.Event(), asyncio.Event()

    async def stream(web, words: int, tokens: int, note: bool) -> float:
        body = {
            "prompt": text(rng, words), "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
            "cache_salt": salt,
        }  # fmt: skip
        began = last = time.monotonic()
        first = 0.0
        async with web.stream("POST", "/v1/completions", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.monotonic()
                if first and note and busy.is_set():
                    gaps.append(now - last)
                first, last = first or now, now
                if note and over.is_set():
                    break
        return first - began

    async with httpx.AsyncClient(base_url=url, timeout=600) as web:
        await stream(web, 300, 4, False)  # connections, and what is measured once

        async def keep_running() -> None:
            while not over.is_set():
                await stream(web, 20, 400, True)

        streams = [asyncio.create_task(keep_running()) for _ in range(args.streams)]
        await asyncio.sleep(3)
        busy.set()
        for _ in range(args.prompts):
            firsts.append(await stream(web, round(WORDS_A_TOKEN * args.prompt_tokens), 4, False))
            await asyncio.sleep(args.pause)
        over.set()
        await asyncio.gather(*streams)
        figures = (await web.get("/metrics")).text
    ordered = sorted(gaps)
    return {
        "chunks": len(gaps),
        "gap_p50_ms": round(1000 * statistics.median(gaps), 1),
        "gap_p99_ms": round(1000 * ordered[int(0.99 * len(ordered))], 1),
        "gap_max_ms": round(1000 * ordered[-1], 1),
        "ttft_of_long_prompts_s": [round(one, 2) for one in firsts],
        **transferred(figures),
    }


def transferred(figures: str) -> dict[str, object]:
    """What a gateway's metrics say of pages that came to its targets, and why others did not."""
    values = {
        (name, labels): float(value)
        for name, labels, value in re.findall(r"^jaxserve:(\w+)_total\{?(.*?)\}? (\S+)$", figures, re.M)
    }

    def of(name: str, label: str = "") -> dict[str, int]:
        found = {
            labels: int(value) for (of, labels), value in values.items() if of == name and label in labels and value
        }
        return {labels.partition('="')[2].rstrip('"'): value for labels, value in found.items()}

    return {
        "prefills": of("gateway_prefills"),
        "fetched_tokens": sum(of("kv_transfer_tokens").values()),
        "fetched_mb": round(sum(of("kv_transfer_bytes", '"in"').values()) / 1e6, 1),
        "not_fetched": of("kv_transfer_fallbacks"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", nargs="+", choices=("both", "apart"), default=["both", "apart"])
    parser.add_argument("--cores", type=int, nargs="+", default=sorted(os.sched_getaffinity(0)))
    parser.add_argument("--model", help="default: the default model")
    parser.add_argument("--kv-cache-memory", default="1GiB", help="of each engine")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two long prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--engine-flags", nargs=argparse.REMAINDER, default=[], help="further flags of the engines; comes last"
    )
    args = parser.parse_args()
    model = ["--model", args.model] if args.model else []
    engine = [
        "serving.launch", "--grpc-port", "0", "--no-http", "--no-progress", "--kv-cache-memory", args.kv_cache_memory,
        "--max-model-len", "8192", "--max-num-seqs", "8", *model, *args.engine_flags,
    ]  # fmt: skip
    half = len(args.cores) // 2
    for mode in args.mode:
        with contextlib.ExitStack() as stack:
            gateway = ["serving.gateway", "--port", "0", *model]
            if mode == "both":
                with on_cores(args.cores):
                    target = ready(stack.enter_context(running(engine)), AT)
            else:
                with on_cores(args.cores[:half]):
                    helper = ready(stack.enter_context(running([*engine, "--role", "prefill"])), AT)
                with on_cores(args.cores[half:]):
                    target = ready(stack.enter_context(running([*engine, "--role", "decode"])), AT)
                gateway += ["--prefill-target", helper]
            process = stack.enter_context(running([*gateway, "--target", target]))
            url = ready(process, r"ready at (http://[\d.]+:\d+)")
            result = asyncio.run(measure(args, url, f"run of {mode}"))
        print(json.dumps({"mode": mode, **result}) if args.json else f"{mode}: {result}", flush=True)


if __name__ == "__main__":
    main()
