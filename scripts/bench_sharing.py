#!/usr/bin/env python3
"""How engines on the same cores hold each other up, and what the way through a gateway takes meanwhile: what
`scripts/simulate.py --slowdown`, `--decode-slowdown`, `--way`, `--front` and `--cores` ask for.

    python scripts/bench_sharing.py --engines 4 --cost cost.json --json        # of scripts/bench.py predict --save-cost cost.json

Starts the engines as scripts/bench_gateway.py does, and has 2, 3, ... of them do nothing but compute prompts of two steps, one
behind the other, so that all of them are in a step all the time (and of 1, each in turn); then nothing but make tokens. A factor
is the median time of that beside what the simulator says that it takes alone. What the gateway and the client compute for a
request and for a token is their processes' own account of chats as long as those of scripts/bench_gateway.py, of one token and of
more. The way is measured with short chats through the gateway, at an engine of its own beside 0, 1, ... that compute prompts: how
much later the first token is seen, in the median, than cost model, factor and that work say, and no less than beside fewer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from serving.engine.api.types import EngineInfo
    from serving.frontends.grpc.client import RemoteEngineClient
    from serving.simulator.cost import CostModel

from scripts.bench_gateway import AT, cpu_seconds, engine_command, ready, running, text

FLAGS = ("slowdown", "decode_slowdown", "way", "front", "cores")
"""Of scripts/simulate.py."""
FRONT_CHATS, FRONT_WORDS, FRONT_TOKENS = 24, 500, 17
"""Of what a gateway and its client compute: chats one behind the other, their words, and tokens of the longer ones."""
PROBE_WORDS, PROBE_REST_S = 12, 0.15
"""Of a chat on its way, and seconds between two."""


async def load(
    clients: Iterator[RemoteEngineClient],
    rng: random.Random,
    prompt_tokens: int,
    max_tokens: int,
    until: float,
    name: str,
) -> list[list[float]]:
    """One request behind the other, each at the next of the engines: of each that was done in time, at least of one, the seconds
    since it was sent at which tokens came."""
    from serving.engine.api.sampling_params import SamplingParams
    from serving.engine.api.types import EngineRequest

    found: list[list[float]] = []
    while True:
        prompt = tuple(rng.randrange(1_000, 40_000) for _ in range(prompt_tokens))
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        began, came = time.monotonic(), []
        async for _ in next(clients).generate(EngineRequest(f"{name}-{len(found)}", prompt, params)):
            came.append(time.monotonic() - began)
        late = time.monotonic() > until
        if found and late:
            return found
        found.append(came)
        if late:
            return found


async def chat(web, target: str, words: str, max_tokens: int, salt: str) -> tuple[float, int]:
    """One through a gateway: seconds to its first token, and tokens of its prompt."""
    body = {
        "messages": [{"role": "user", "content": words}], "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True}, "cache_salt": salt,
    }  # fmt: skip
    began, first, prompt = time.monotonic(), 0.0, 0
    headers = {"x-gateway-destination-endpoint": target}
    async with web.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if any(choice["delta"].get("content") for choice in chunk["choices"]):
                    first = first or time.monotonic()
                prompt = (chunk.get("usage") or {}).get("prompt_tokens", prompt)
    return (first or time.monotonic()) - began, prompt


async def probe(web, target: str, rng: random.Random, until: float) -> list[tuple[float, int]]:
    """Short chats through a gateway, with pauses: seconds to the first token of each, and tokens of its prompt."""
    found = []
    while time.monotonic() < until:
        found.append(await chat(web, target, text(rng, PROBE_WORDS), 1, str(rng.random())))
        await asyncio.sleep(PROBE_REST_S)
    return found


async def front(web, target: str, gateway: int) -> tuple[float, float]:
    """Seconds that the gateway's process, those that it has started and this one compute for a chat, and for each of its tokens."""
    words, per_chat = text(random.Random(0), FRONT_WORDS), []
    await chat(web, target, words, 1, "front")  # the engine has its prompt then
    for max_tokens in (1, FRONT_TOKENS):
        before = cpu_seconds(gateway) + time.process_time()
        for _ in range(FRONT_CHATS):
            await chat(web, target, words, max_tokens, "front")
        per_chat.append((cpu_seconds(gateway) + time.process_time() - before) / FRONT_CHATS)
    token = max(0.0, per_chat[1] - per_chat[0]) / (FRONT_TOKENS - 1)
    return max(0.0, per_chat[0] - token), token


class Alone:
    """What the simulator says of an engine that has all cores."""

    def __init__(self, cost: CostModel, info: EngineInfo) -> None:
        from serving.engine.api.config import EngineConfig
        from serving.engine.requests.scheduler_config import SchedulerConfig

        self.cost = dataclasses.replace(
            cost, max_num_seqs=info.max_num_seqs, max_num_batched_tokens=info.max_num_batched_tokens
        )
        table = self.cost.buckets
        config = EngineConfig(
            max_num_seqs=info.max_num_seqs, max_num_batched_tokens=info.max_num_batched_tokens,
            max_model_len=info.max_model_len, page_size=info.page_size,
        )  # fmt: skip
        self._config = SchedulerConfig.of(
            config,
            max_chunk_tokens=table.max_chunk,
            max_chunk_rows=table.max_rows,
            num_pages=info.num_pages,
            buckets=table,
        )

    def first_token(self, prompt_tokens: int) -> float:
        """Seconds to it."""
        from serving.simulator.simulate import Simulation
        from serving.simulator.trace import TraceRequest

        (one,) = Simulation(self._config, self.cost).run([TraceRequest(0.0, prompt_tokens, 1)])
        return one.ttft

    def token(self, context: int) -> float:
        """Seconds that one of a stream's takes."""
        from serving.simulator.cost import StepShape

        return self.cost.seconds(StepShape(1, 0, 0, context, 0.0))


async def measure(args: argparse.Namespace, targets: list[str], url: str, gateway: int) -> dict[str, Any]:
    """Factors of steps with and without prompts while so many engines are in one, and the way while so many have requests.

    Args:
        gateway: its process; `url`: where it listens.
    """
    import httpx

    from serving.frontends.grpc.client import RemoteEngineClient
    from serving.simulator.cost import CostModel
    from serving.simulator.sharing import Sharing

    clients = [await RemoteEngineClient.connect(target) for target in targets]
    alone = Alone(CostModel.load(args.cost), clients[0].info())
    info = clients[0].info()
    long = min(2 * info.max_num_batched_tokens, info.max_model_len - 8)

    async def together(count: int, prompt_tokens: int, max_tokens: int) -> list[list[float]]:
        until, kind = time.monotonic() + args.seconds, f"{count} {prompt_tokens} {max_tokens}"
        # One at a time is each in turn: in a fleet whoever computes alone has not done so just before either.
        several = [clients] if count == 1 else [[client] for client in clients[:count]]
        some = [
            load(itertools.cycle(own), random.Random(f"{kind} {i}"), prompt_tokens, max_tokens, until, f"{kind} {i}")
            for i, own in enumerate(several[:count])
        ]
        return [one for of in await asyncio.gather(*some) for one in of]

    prompts, tokens, way = [], [], []
    for count in range(1, len(clients) + 1):
        took = statistics.median(one[-1] for one in await together(count, long, 1))
        prompts.append(took / alone.first_token(long))
        gaps = [(one[-1] - one[0]) / (len(one) - 1) for one in await together(count, 16, args.max_tokens)]
        tokens.append(statistics.median(gaps) / alone.token(16 + args.max_tokens // 2))
    factors = [max(1.0, one) for one in prompts]
    cores = os.cpu_count() or 1
    async with httpx.AsyncClient(base_url=url, timeout=300) as web:
        await probe(web, targets[-1], random.Random(0), time.monotonic() + 0.5)  # what is slow the first time
        request_s, token_s = await front(web, targets[0], gateway)
        sharing = Sharing(tuple(factors), front=(request_s, token_s), cores=cores)
        for count in range(len(clients)):
            others = together(count, long, 1)
            probing = probe(web, targets[count], random.Random(1 + count), time.monotonic() + args.seconds)
            _, found = await asyncio.gather(others, probing)
            work = (request_s + token_s) * sharing.front_factor(count)
            way.append(statistics.median(late - work - factors[count] * alone.first_token(n) for late, n in found))
    for client in clients:
        await client.close()
    return {
        "slowdown": [round(one, 3) for one in factors],
        "decode_slowdown": [round(max(1.0, one), 3) for one in tokens],
        "way": [round(one, 4) for one in itertools.accumulate((max(0.0, one) for one in way), max)],
        "front": [round(request_s, 4), round(token_s, 5)],
        "cores": [cores],
        "measured": [[round(one, 3) for one in prompts], [round(one, 3) for one in tokens]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--model", help="default: the default model")
    parser.add_argument(
        "--cost", required=True, help="cost model of an engine with these settings, of scripts/bench.py predict"
    )
    parser.add_argument("--kv-cache-memory", default="64MiB", help="of each engine")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=64, help="of a stream")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each number of engines, each of the three ways")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        command = engine_command(args)
        targets = [ready(stack.enter_context(running(command)), AT)]  # which compiles what the others find in the cache
        others = [stack.enter_context(running(command)) for _ in range(args.engines - 1)]
        targets += [ready(one, AT) for one in others]
        gateway = ["serving.gateway", "--port", "0", *(["--model", args.model] if args.model else [])]
        process = stack.enter_context(running([*gateway, "--target", *targets]))
        url = ready(process, r"ready at (http://[\d.]+:\d+)")
        result = asyncio.run(measure(args, targets, url, process.pid))
    flags = " ".join(f"--{name.replace('_', '-')} {' '.join(map(str, result[name]))}" for name in FLAGS)
    print(json.dumps(result) if args.json else flags)


if __name__ == "__main__":
    main()
