#!/usr/bin/env python3
"""How much longer engines take while others work on the same cores: what `scripts/simulate.py --slowdown` asks for.

    python scripts/bench_sharing.py --engines 4 --json

Starts the engines as scripts/bench_gateway.py does, and has the first 1, 2, ... of them compute prompts of `--prompt-tokens` with a
few tokens to answer, one behind the other. A factor is the median time of a request beside that of one engine alone.
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

from scripts.bench_gateway import AT, engine_command, ready, running


async def load(client, rng: random.Random, args: argparse.Namespace, until: float, name: str) -> list[float]:
    """One request behind the other; seconds of each that was done in time."""
    from serving.engine.api.sampling_params import SamplingParams
    from serving.engine.api.types import EngineRequest

    found: list[float] = []
    while True:
        prompt = tuple(rng.randrange(1_000, 40_000) for _ in range(args.prompt_tokens))
        params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, ignore_eos=True)
        began = time.monotonic()
        async for _ in client.generate(EngineRequest(f"{name}-{len(found)}", prompt, params)):
            pass
        if time.monotonic() > until:
            return found
        found.append(time.monotonic() - began)


async def measure(args: argparse.Namespace, targets: list[str]) -> dict[str, object]:
    """Median seconds of a request while so many engines work, and the factors."""
    from serving.frontends.grpc.client import RemoteEngineClient

    clients = [await RemoteEngineClient.connect(target) for target in targets]
    medians = []
    for count in range(1, len(clients) + 1):
        until = time.monotonic() + args.seconds
        some = [
            load(client, random.Random(f"{count} {i}"), args, until, f"{count}-{i}")
            for i, client in enumerate(clients[:count])
        ]
        found = [one for of in await asyncio.gather(*some) for one in of]
        medians.append(statistics.median(found))
    for client in clients:
        await client.close()
    return {
        "request_s": [round(one, 4) for one in medians],
        "slowdown": [round(max(1.0, one / medians[0]), 3) for one in medians],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--model", help="default: the default model")
    parser.add_argument("--kv-cache-memory", default="64MiB", help="of each engine")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each number of engines")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        command = engine_command(args)
        targets = [ready(stack.enter_context(running(command)), AT)]  # which compiles what the others find in the cache
        others = [stack.enter_context(running(command)) for _ in range(args.engines - 1)]
        targets += [ready(one, AT) for one in others]
        result = asyncio.run(measure(args, targets))
    print(
        json.dumps(result)
        if args.json
        else f"--slowdown {' '.join(map(str, result['slowdown']))}  ({result['request_s']} s a request)"
    )


if __name__ == "__main__":
    main()
