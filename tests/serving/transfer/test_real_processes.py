"""A server on a mesh of two devices that computes prompts, one on a single device that goes on with them, and a gateway in front:
all real processes, with a network between that can be broken."""

from __future__ import annotations

import asyncio
import json
import random
import re
import zlib

import httpx
import pytest

from tests.serving.processes.test_two_processes import Process, free_port
from tests.serving.transfer.proxy import Proxy
from tests.tiny_checkpoint import VOCAB, write_tiny_checkpoint

pytestmark = pytest.mark.slow

FLAGS = (  # without a word "auto" quantizes on one device alone, and other weights make other pages
    "--dtype", "float32", "--quantization", "none", "--max-num-seqs", "8", "--max-num-batched-tokens", "64",
    "--max-model-len", "256", "--page-size", "8", "--kv-cache-memory", "3MB", "--no-progress", "--max-logprobs", "5",
)  # fmt: skip
GIVES = '{"lease_s": 2.0}'
TAKES = '{"stall_s": 1.5, "timeout_s": 8.0}'
DEADLINE_S = 20.0
"""Within which every client has its answer, or is told that there is none."""


class GatewayProcess(Process):
    """As `Process`, of a gateway."""

    module = "serving.gateway"


class Fleet:
    """The three processes.

    Attributes:
        urls: HTTP of "prefill", "decode" and "gateway".
        mesh, gives, takes: flags of the engine that computes prompts, and how both exchange pages.
    """

    mesh: tuple[str, ...] = ("--mesh", "model=2", "--cpu-devices", "2")
    gives, takes = GIVES, TAKES

    def __init__(self, folder) -> None:
        self.model = write_tiny_checkpoint(folder / "model")
        self.programs = folder / "programs"
        self.ports = {
            (name, kind): free_port() for name in ("prefill", "decode", "gateway") for kind in ("grpc", "http")
        }
        self.urls = {name: f"http://127.0.0.1:{self.ports[name, 'http']}" for name in ("prefill", "decode", "gateway")}
        self.proxy = Proxy(self.ports["prefill", "grpc"])
        self.processes = {}
        for name in ("prefill", "decode", "gateway"):
            self.start(name)
        for name in ("prefill", "decode", "gateway"):
            self.wait(name)

    def start(self, name) -> None:
        ports = ("--grpc-port", str(self.ports[name, "grpc"]), "--port", str(self.ports[name, "http"]))
        if name == "gateway":
            targets = (
                "--target",
                f"127.0.0.1:{self.ports['decode', 'grpc']}",
                "--prefill-target",
                f"127.0.0.1:{self.proxy.port}",
            )
            how = ("--prefill-policy", "always", "--prefill-min-tokens", "16")
            self.processes[name] = GatewayProcess("--model", str(self.model), *targets, *how, *ports)
            return
        role = ("--role", name, "--kv-transfer-config", self.gives if name == "prefill" else self.takes)
        mesh = self.mesh if name == "prefill" else ()
        common = ("--model", str(self.model), "--compile-cache", str(self.programs), *FLAGS)
        self.processes[name] = Process(*common, *role, *mesh, *ports)

    def wait(self, name) -> None:
        self.processes[name].wait_for(r"ready at ")

    def kill(self, name) -> None:
        self.processes[name].popen.kill()
        self.processes[name].popen.wait()

    async def again(self, name) -> None:
        """Starts it once more at its address; the gateway has found it when this returns."""
        self.start(name)
        await asyncio.to_thread(self.wait, name)
        await asyncio.sleep(3.5)  # it looks for those that are gone every 3 seconds at least

    def close(self) -> None:
        for name in self.processes:
            self.kill(name)
        self.proxy.close()

    async def figures(self, name) -> dict[str, float]:
        """Metrics that have at most one label of their own: name, or name:value."""
        async with httpx.AsyncClient(timeout=10) as web:
            text = (await web.get(f"{self.urls[name]}/metrics")).text
        found = {}
        for metric, labels, value in re.findall(r"^jaxserve:(\w+)(?:\{([^}]*)\})? (\S+)$", text, re.M):
            own = re.findall(r'(?!model_name|engine)\b\w+="([^"]*)"', labels)
            found[":".join([metric, *own])] = float(value)
        return found

    async def why(self) -> str:
        """What became of transfers, for whoever reads a failure."""
        found = {**await self.figures("decode"), **await self.figures("gateway")}
        told = {k: v for k, v in found.items() if v and k.startswith(("kv_transfer", "gateway_prefill"))}
        return f"{told}\n{self.processes['decode'].text[-2000:]}"

    async def ask(self, name, prompt, within=DEADLINE_S, **more):
        """An answer: (status, JSON)."""
        body = {
            "prompt": list(prompt),
            "max_tokens": 12,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **more,
        }
        async with httpx.AsyncClient(timeout=within) as web:
            reply = await web.post(f"{self.urls[name]}/v1/completions", json=body)
        return reply.status_code, reply.json()

    async def tokens(self, name, prompt, **more):
        status, reply = await self.ask(name, prompt, **more)
        assert status == 200, reply
        return [choice["token_ids"] for choice in reply["choices"]]

    async def nothing_left(self, *names) -> None:
        """No request, no lease and no page in use."""
        gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "kv_transfer_leases",
                  "kv_transfer_leased_pages", "kv_transfer_receiving")  # fmt: skip
        for name in names or ("prefill", "decode"):
            for _ in range(100):
                found = await self.figures(name)
                left = {gauge: found[gauge] for gauge in gauges if found[gauge]}
                if not left:
                    break
                await asyncio.sleep(0.1)
            assert not left, f"{name}: {left}"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    yield made
    made.close()


def prompt(length, seed):
    rng = random.Random(seed)
    return [rng.randrange(2, VOCAB) for _ in range(length)]


def shapes():
    """64 requests: long ones that are computed in pieces, shared beginnings, masks, log probabilities, several completions."""
    options = (
        {}, {"logprobs": 3}, {"allowed_token_ids": [*range(20, 60)]}, {"n": 2, "temperature": 0.9, "seed": 3},
        {"max_tokens": 24}, {"repetition_penalty": 1.3}, {"logprobs": 0, "n": 2, "temperature": 0.5, "seed": 9},
        {"logit_bias": {"7": 3, "9": -100}},
    )  # fmt: skip
    rng = random.Random(1)
    stems = [prompt(60, 100 + i) for i in range(5)]
    for i in range(64):
        yield stems[i % 5][: rng.choice((0, 23, 60))] + prompt(rng.randrange(12, 130), i), options[i % len(options)]


async def test_64_requests_from_two_devices_to_one(fleet):
    requests = list(shapes())
    alone = [await fleet.ask("decode", tokens, 120, cache_salt="alone", **more) for tokens, more in requests]
    before = await fleet.figures("decode")
    apart = await asyncio.gather(
        *(fleet.ask("gateway", tokens, 120, cache_salt="apart", **more) for tokens, more in requests)
    )
    after = await fleet.figures("decode")
    for (status, found), (_, expected) in zip(apart, alone, strict=True):
        assert status == 200, found
        for one, other in zip(found["choices"], expected["choices"], strict=True):
            assert (one["token_ids"], one["text"], one["finish_reason"]) == (
                other["token_ids"], other["text"], other["finish_reason"],
            )  # fmt: skip
            if one["logprobs"]:
                assert one["logprobs"]["token_logprobs"] == pytest.approx(other["logprobs"]["token_logprobs"], abs=1e-4)
    travelled = after["kv_transfer_tokens_total"] - before["kv_transfer_tokens_total"]
    assert travelled > sum(len(tokens) for tokens, _ in requests) / 3, await fleet.why()
    assert (await fleet.figures("gateway"))["gateway_prefill_failures_total"] == 0
    await fleet.nothing_left()


@pytest.fixture
async def expected(fleet, request):
    """A prompt and what one engine answers."""
    tokens = prompt(200, zlib.crc32(request.node.name.encode()))
    return tokens, await fleet.tokens("decode", tokens, cache_salt=f"alone {request.node.name}", max_tokens=30)


@pytest.mark.parametrize("what", ["cut", "hold", "spoil"])
async def test_a_network_that_is_cut_slow_or_wrong_in_the_middle(fleet, expected, what):
    tokens, answer = expected
    await asyncio.sleep(3.5)  # a connection that was cut before is there again
    fleet.proxy.after(40_000, what)
    try:
        assert await fleet.tokens("gateway", tokens, cache_salt=what, max_tokens=30) == answer
        assert fleet.proxy.happened.is_set(), await fleet.why()
    finally:
        fleet.proxy.release()
    await fleet.nothing_left()


async def test_a_lease_that_is_over_and_a_ticket_that_is_used_twice(fleet, expected):
    tokens, answer = expected
    ask = {"do_remote_decode": True, "do_remote_prefill": False}

    async def computed(salt):
        _, reply = await fleet.ask("prefill", tokens, max_tokens=1, kv_transfer_params=ask, cache_salt=salt)
        return reply["kv_transfer_params"]

    before = await fleet.figures("prefill")
    given = await computed("late")
    await asyncio.sleep(2.6)
    await fleet.nothing_left("prefill")
    assert (await fleet.figures("prefill"))["kv_transfer_leases_expired_total"] == before[
        "kv_transfer_leases_expired_total"
    ] + 1
    late = {"kv_transfer_params": given, "cache_salt": "late", "max_tokens": 30}
    assert await fleet.tokens("decode", tokens, **late) == answer
    twice = {"kv_transfer_params": await computed("twice"), "cache_salt": "twice", "max_tokens": 30}
    assert await asyncio.gather(*(fleet.tokens("decode", tokens, **twice) for _ in range(2))) == [answer, answer]
    await fleet.nothing_left()


async def streamed(fleet, tokens, first, **more):
    """Reads a stream; `first` is called behind its first token. (token ids, error)."""
    body = {
        "prompt": tokens,
        "max_tokens": 30,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        **more,
    }
    found, error = [], None
    async with httpx.AsyncClient(base_url=fleet.urls["gateway"], timeout=DEADLINE_S) as web:
        async with web.stream("POST", "/v1/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    error = chunk.get("error", error)
                    for choice in chunk.get("choices", ()):
                        if not found:
                            first()
                        found += choice["token_ids"]
    return found, error


async def test_the_prefill_engine_is_killed_after_before_and_during_a_transfer_and_comes_back(fleet, expected):
    tokens, (answer,) = expected
    found, error = await streamed(fleet, tokens, lambda: fleet.kill("prefill"), cache_salt="after")
    assert (found, error) == (answer, None)
    assert await fleet.tokens("gateway", tokens, cache_salt="before", max_tokens=30) == [answer]
    await fleet.nothing_left("decode")
    await fleet.again("prefill")
    before = (await fleet.figures("decode"))["kv_transfer_tokens_total"]
    assert await fleet.tokens("gateway", tokens, cache_salt="anew", max_tokens=30) == [answer]
    assert (await fleet.figures("decode"))["kv_transfer_tokens_total"] >= before + 192, (
        "it is asked again, under its address"
    )
    fleet.proxy.after(40_000, "hold")
    asked = asyncio.create_task(fleet.tokens("gateway", tokens, cache_salt="during", max_tokens=30))
    await asyncio.to_thread(fleet.proxy.happened.wait, DEADLINE_S)
    fleet.kill("prefill")
    fleet.proxy.release()
    fleet.proxy.cut()
    assert await asked == [answer]
    await fleet.nothing_left("decode")
    await fleet.again("prefill")
    await fleet.nothing_left()


async def test_the_decode_engine_is_killed_while_it_fetches_and_while_it_answers(fleet, expected):
    tokens, (answer,) = expected
    found, error = await streamed(fleet, tokens, lambda: fleet.kill("decode"), cache_salt="answers")
    assert error is not None and found == answer[: len(found)], (
        "what came is right, and the client is told that it is not all"
    )
    await fleet.nothing_left("prefill")
    await fleet.again("decode")
    assert await fleet.tokens("gateway", tokens, cache_salt="back", max_tokens=30) == [answer]
    fleet.proxy.after(40_000, "hold")
    asked = asyncio.create_task(fleet.ask("gateway", tokens, cache_salt="fetches"))
    await asyncio.to_thread(fleet.proxy.happened.wait, DEADLINE_S)
    fleet.kill("decode")
    fleet.proxy.release()
    status, reply = await asked
    assert status == 503 and reply["error"]["message"], reply
    await fleet.nothing_left("prefill")
    await fleet.again("decode")
    await fleet.nothing_left()
