#!/usr/bin/env python3
"""How much longer engines take while others work on the same cores, and what the way through a gateway takes meanwhile: what
`scripts/simulate.py --slowdown` and `--way` ask for.

    python scripts/bench_sharing.py --engines 4 --cost cost.json --json        # of scripts/bench.py predict --save-cost cost.json

Starts the engines as scripts/bench_gateway.py does, and has the first 1, 2, ... of them compute prompts of `--prompt-tokens` with a
few tokens to answer, one behind the other. A factor is the median time of a request beside that of one engine alone. Then the same
as chats over HTTP, through a gateway that is told which engine: how much later the first token is seen, in the median, than cost
model and factor say, is the way.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.bench_gateway import AT, engine_command, ready, running, text

Taken = tuple[float, float]
"""Seconds to the first token of a request, and to its end."""


async def load(client, rng: random.Random, args: argparse.Namespace, until: float, name: str) -> list[Taken]:
    """One request behind the other, those that were done in time."""
    from serving.engine.api.sampling_params import SamplingParams
    from serving.engine.api.types import EngineRequest

    found: list[Taken] = []
    while True:
        prompt = tuple(rng.randrange(1_000, 40_000) for _ in range(args.prompt_tokens))
        params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, ignore_eos=True)
        began, first = time.monotonic(), 0.0
        async for _ in client.generate(EngineRequest(f"{name}-{len(found)}", prompt, params)):
            first = first or time.monotonic()
        if time.monotonic() > until:
            return found
        found.append((first - began, time.monotonic() - began))


async def chat(web, target: str, rng: random.Random, args: argparse.Namespace, until: float) -> list[Taken]:
    """The same through a gateway."""
    found: list[Taken] = []
    while True:
        # Words have 1.6 tokens, and the template has some: fewer than the others' prompts, and padded to the same step.
        body = {
            "messages": [{"role": "user", "content": text(rng, int(0.5 * args.prompt_tokens))}], "max_tokens": args.max_tokens,
            "temperature": 0, "ignore_eos": True, "stream": True, "cache_salt": str(rng.random()),
        }  # fmt: skip
        began, first = time.monotonic(), 0.0
        headers = {"x-gateway-destination-endpoint": target}
        async with web.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if not first and line.startswith("data: {") and '"content":"' in line and '"content":""' not in line:
                    first = time.monotonic()
        if time.monotonic() > until:
            return found
        found.append((first - began, time.monotonic() - began))


def predicted(args: argparse.Namespace) -> float | None:
    """Seconds to the first token of a prompt at an engine alone, by the cost model; None without one."""
    if args.cost is None:
        return None
    from serving.simulator.cost import CostModel, StepShape

    cost, tokens = CostModel.load(args.cost), args.prompt_tokens
    return cost.host_s + cost.seconds(StepShape(0, tokens, 1, 0, tokens * tokens / 2))


async def measure(args: argparse.Namespace, targets: list[str], url: str) -> dict[str, list[float]]:
    """Median seconds of a request while so many engines work, the factors, and the way."""
    import httpx

    from serving.frontends.grpc.client import RemoteEngineClient

    clients = [await RemoteEngineClient.connect(target) for target in targets]
    direct: list[Taken] = []
    through: list[float] = []

    async def medians(some) -> Taken:
        found = [one for of in await asyncio.gather(*some) for one in of]
        return statistics.median(one[0] for one in found), statistics.median(one[1] for one in found)

    async with httpx.AsyncClient(base_url=url, timeout=300) as web:
        for count in range(1, len(clients) + 1):
            rngs = [random.Random(f"{count} {i}") for i in range(count)]
            until = time.monotonic() + args.seconds
            some = [load(clients[i], rng, args, until, f"{count}-{i}") for i, rng in enumerate(rngs)]
            direct.append(await medians(some))
            until = time.monotonic() + args.seconds
            through.append((await medians([chat(web, targets[i], rng, args, until) for i, rng in enumerate(rngs)]))[0])
    for client in clients:
        await client.close()
    slowdown = [max(1.0, one / direct[0][1]) for _, one in direct]
    model = predicted(args)
    way = [] if model is None else [max(0.0, late - model * s) for late, s in zip(through, slowdown, strict=True)]
    return {
        "request_s": [round(one, 4) for _, one in direct],
        "first_token_s": [round(one, 4) for one, _ in direct],
        "first_token_of_chats_s": [round(one, 4) for one in through],
        "slowdown": [round(one, 3) for one in slowdown],
        "way": [round(one, 4) for one in way],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--model", help="default: the default model")
    parser.add_argument("--cost", help="cost model of an engine with these settings, for the way")
    parser.add_argument("--kv-cache-memory", default="64MiB", help="of each engine")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each number of engines, either way")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        command = engine_command(args)
        targets = [ready(stack.enter_context(running(command)), AT)]  # which compiles what the others find in the cache
        others = [stack.enter_context(running(command)) for _ in range(args.engines - 1)]
        targets += [ready(one, AT) for one in others]
        gateway = ["serving.gateway", "--port", "0", *(["--model", args.model] if args.model else [])]
        process = stack.enter_context(running([*gateway, "--target", *targets]))
        result = asyncio.run(measure(args, targets, ready(process, r"ready at (http://[\d.]+:\d+)")))
    told = [f"--{name} {' '.join(map(str, result[name]))}" for name in ("slowdown", "way") if result[name]]
    print(json.dumps(result) if args.json else f"{' '.join(told)}  ({result['request_s']} s a request)")


if __name__ == "__main__":
    main()
