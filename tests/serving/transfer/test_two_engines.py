"""Prompts computed by one tiny engine and continued by another: the tokens of one engine alone, whatever goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import time

import httpx
import pytest

from serving.engine.api.peers.stats import REASONS
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest, FinishReason, TransferParams
from serving.frontends.app import serve_http
from serving.frontends.grpc.client import RemoteEngineClient
from serving.frontends.grpc.server import GrpcServer
from serving.gateway import Pool
from serving.gateway.prefills import Prefills
from serving.transfer.config import TransferConfig
from serving.transfer.grpc_transport import GrpcTransport
from tests.mock_engine import mock_service
from tests.serving.engine.grammars import constraints
from tests.serving.engine.test_engine import alone, make_requests, run, settle
from tests.serving.transfer import local
from tests.tiny import VOCAB, tiny_engine

P = "prefill:1"
WAYS = TransferConfig("both", peers=("*",), lease_s=20.0, timeout_s=10.0, stall_s=1.5)
SIZES = {"max_model_len": 256, "num_pages": 60}
"""Those of test_disk.py too: what is compiled is compiled once."""


@pytest.fixture(scope="module")
def pair():
    """(the engine that prefills, the one that decodes, the way between them)."""
    transport = local.LocalTransport()
    first = tiny_engine(transfers=dataclasses.replace(WAYS, role="prefill"), **SIZES)
    second = tiny_engine(transfers=dataclasses.replace(WAYS, role="decode"), transport=transport, **SIZES)
    yield first, second, transport
    for engine in (first, second):
        engine.shutdown()
        engine.runner.guard.check()


@pytest.fixture(autouse=True)
def clean(pair):
    """Nothing cached, nothing broken, and nothing left afterwards."""
    first, second, transport = pair
    for engine in (first, second):
        engine.call(engine.scheduler.kv.forget)
    transport.engines, transport.before = {P: first}, lambda parcel: parcel
    yield


def prompt(length, seed=0):
    rng = random.Random(seed)
    return tuple(rng.randrange(VOCAB) for _ in range(length))


def request(name, tokens, **params):
    return EngineRequest(name, tuple(tokens), SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **params}))


def halves(whole, ticket):
    """A request as the one that prefills and the one that decodes get it."""
    one = dataclasses.replace(
        whole, request_id=f"p-{whole.request_id}", params=SamplingParams(temperature=0.0, max_tokens=1), constraint=None,
        transfer=TransferParams(remote_decode=True, ticket=ticket),
    )  # fmt: skip
    host, port = P.split(":")
    other = dataclasses.replace(
        whole, transfer=TransferParams(remote_prefill=True, host=host, port=int(port), ticket=ticket)
    )
    return one, other


async def apart(pair, whole, first_done=False):
    """Both halves: at once, as a gateway sends them, or one after the other, as vLLM's proxies do."""
    first, second, _ = pair
    one, other = halves(whole, f"ticket-{whole.request_id}")
    if first_done:
        await run(first, one)
        return await run(second, other)
    _, found = await asyncio.gather(run(first, one), run(second, other))
    return found


async def nothing_left(pair):
    """No page and no request on either side, once the leases are over."""
    first, second, _ = pair
    for ticket in first.call(lambda: list(first.page_source._tickets)):
        first.page_source.release(ticket)
    for engine in (first, second):
        await settle(engine)
        engine.call(engine.scheduler.pool.check)
    taking = second.loop.peers.taking
    for _ in range(500):
        if not second.call(lambda: taking.busy):
            break
        await asyncio.sleep(0.01)
    assert second.call(lambda: (second.scheduler.receiving.count, taking.busy)) == (0, False)


def told(engine):
    return engine.call(lambda: engine.loop.peers.stats)


def mixed(count):
    """Chunked prompts, of which some begin alike, with every sampling option, and grammars: (request, which prompt it is), where
    several completions of one prompt (`n`) have the same. Anew each time: grammars remember where they are."""
    rng = random.Random(5)
    made = [
        dataclasses.replace(r, prompt_token_ids=prompt(rng.randrange(40), 1) + r.prompt_token_ids + prompt(rng.randrange(90), i))
        for i, r in enumerate(make_requests(count, seed=3))
    ]  # fmt: skip
    found = [(r, i) for i, r in enumerate(made)]
    for i, grammar in enumerate(constraints()):
        whole = request(
            f"g{i}", prompt(30 + 9 * i, 70 + i), max_tokens=40, logprobs=1, temperature=float(i % 2), seed=i
        )
        found.append((dataclasses.replace(whole, constraint=grammar), count + i))
    first = request("n0", prompt(75, 9), temperature=1.0, seed=1)
    found += [
        (dataclasses.replace(first, request_id=f"n{i}", params=dataclasses.replace(first.params, seed=i)), 2 * count)
        for i in range(4)
    ]
    return found


async def each_apart(pair, whole, first_done):
    """All of them at once; completions of one prompt are computed from one prompt, as a gateway has it done."""
    first, second, _ = pair
    prompts = {number: halves(one, f"ticket {number}")[0] for one, number in reversed(whole)}
    others = [halves(one, f"ticket {number}")[1] for one, number in whole]
    computing = [run(first, one) for one in prompts.values()]
    if first_done:
        await asyncio.gather(*computing)
        computing = []
    done = await asyncio.gather(*(run(second, one) for one in others), *computing)
    return done[: len(others)]


@pytest.mark.parametrize(("first_done", "count"), [(False, 54), (True, 9)])
async def test_tokens_are_those_of_one_engine(pair, first_done, count):
    first, second, _ = pair
    whole = mixed(count)
    expected = await alone(second, [one for one, _ in mixed(count)])
    for engine in (first, second):
        engine.call(engine.scheduler.kv.forget)
    before = told(second)
    found = await each_apart(pair, whole, first_done)
    assert {r.request_id: f.token_ids for (r, _), f in zip(whole, found, strict=True)} == {
        name: one.token_ids for name, one in expected.items()
    }
    for one in found:
        own, others = one.logprobs or (), expected[one.request_id].logprobs or ()
        assert [e.logprob for e in own] == pytest.approx([e.logprob for e in others], abs=1e-4)
    after = told(second)
    tokens = sum({number: len(r.prompt_token_ids) for r, number in whole}.values())
    assert after.tokens_in - before.tokens_in > tokens / 10, "pools are small, and leases give way to whoever runs"
    assert after.bytes_in > before.bytes_in and told(first).bytes_out > 0 and after.seconds_in > 0
    await nothing_left(pair)


async def test_what_came_is_not_computed(pair):
    first, second, _ = pair
    whole = request("a", prompt(150))
    output = await run(first, halves(whole, "t")[0])
    assert output.transfer == TransferParams(remote_prefill=True, ticket="t")
    assert told(first).leases == 1 and told(first).leased_pages == 18, "of 150 tokens"
    found = await run(second, halves(whole, "t")[1])
    assert found.num_cached_tokens == 144 and told(first).leases == 0
    await nothing_left(pair)


async def test_several_completions_of_one_prompt_fetch_it_once(pair):
    first, second, transport = pair
    one, other = halves(request("a", prompt(100), max_tokens=6), "t")
    sampled = [SamplingParams(temperature=1.0, seed=i, max_tokens=6) for i in range(4)]
    others = [dataclasses.replace(other, request_id=f"a{i}", params=params) for i, params in enumerate(sampled)]
    fetches = transport.fetches
    _, *found = await asyncio.gather(run(first, one), *(run(second, o) for o in others))
    assert transport.fetches == fetches + 1 and all(f.num_cached_tokens >= 96 for f in found)
    expected = [await run(second, dataclasses.replace(o, request_id=f"x{o.request_id}", transfer=None)) for o in others]
    assert [f.token_ids for f in found] == [e.token_ids for e in expected]
    await nothing_left(pair)


async def test_what_is_cached_there_is_not_sent(pair):
    first, second, _ = pair
    stem = prompt(80)
    await run(second, request("before", stem))
    sent = told(first).bytes_out
    found = await apart(pair, request("a", stem + prompt(40, 9)))
    assert found.num_cached_tokens == 112
    page = told(first).bytes_out - sent
    assert page == 4 * 3 * 2 * 8 * 2 * 16 * 4, "four pages of 3 layers, K and V, 8 tokens, 2 heads of 16, float32"
    await nothing_left(pair)


async def _falls_back(pair, whole, reason, first_done=True):
    """The request's tokens are right although its pages do not (all) come, for this reason."""
    second = pair[1]
    expected = await run(second, dataclasses.replace(whole, request_id="expected"))
    second.call(second.scheduler.kv.forget)
    before = told(second).fallbacks[REASONS.index(reason)]
    found = await apart(pair, whole, first_done)
    assert found.token_ids == expected.token_ids and found.finish_reason is FinishReason.LENGTH
    assert told(second).fallbacks[REASONS.index(reason)] == before + 1, told(second)
    await nothing_left(pair)
    return found


@pytest.mark.parametrize(
    ("way", "reason", "cached"),
    [
        (local.cut_at(5), "unreachable", 40),
        (local.cut_at(0), "unreachable", 0),
        (local.spoilt(3), "wrong_digest", 24),
        (lambda parcel: None if parcel and parcel.page == 2 else parcel, "wrong_digest", 16),
        (lambda parcel: dataclasses.replace(parcel, page=0) if parcel else None, "wrong_digest", 8),
        (local.slow(2.5), "too_slow", None),
    ],
    ids=["cut in the middle", "cut at once", "spoilt", "a page lost", "a page twice", "slow"],
)
async def test_a_bad_way(pair, way, reason, cached):
    pair[2].before = way
    found = await _falls_back(pair, request("a", prompt(100)), reason)
    if cached is not None:
        assert found.num_cached_tokens == cached, "what was verified by then is used"


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_long_step_is_no_silence(pair, side):
    """A step may take longer than a peer may be silent: whoever gives says that it lives, whoever takes does not blame the peer."""
    first, second, _ = pair
    taking = second.loop.peers.taking
    config, taking._config = taking._config, dataclasses.replace(WAYS, role="decode", stall_s=0.8)
    busy = (first if side == "prefill" else second).loop
    try:
        one, other = halves(request("a", prompt(150)), "t")
        await run(first, one)
        if side == "prefill":
            busy.ask(lambda: time.sleep(1.6))
        else:
            pair[2].before = lambda parcel: (
                busy.ask(lambda: time.sleep(1.6)) and parcel if parcel and not parcel.page else parcel
            )
        found = await run(second, other)
        assert found.num_cached_tokens == 144, told(second)
    finally:
        taking._config = config
    await nothing_left(pair)


async def test_a_peer_that_is_not_there(pair):
    pair[2].engines = {}
    await _falls_back(pair, request("a", prompt(100)), "unreachable")


async def test_a_peer_that_was_started_anew_has_nothing(pair):
    first, second, _ = pair
    whole = request("a", prompt(100))
    one, other = halves(whole, "t")
    await run(first, one)
    first.page_source.release("t")
    first.call(first.scheduler.kv.forget)
    expected = await run(second, request("expected", prompt(100)))
    second.call(second.scheduler.kv.forget)
    found = await run(second, other)
    assert found.token_ids == expected.token_ids and found.num_cached_tokens == 0
    await nothing_left(pair)


async def test_weights_that_change_meanwhile(pair):
    first = pair[0]
    identity = first.page_source.identity
    try:
        first.call(first.loop.peers.weights_changed)
        await _falls_back(pair, request("a", prompt(100)), "other_model")
    finally:
        first.page_source.identity = identity


async def test_a_lease_that_is_over(pair):
    first, _, _ = pair
    giving, expired = first.page_source, told(first).leases_expired
    config, giving._config = giving._config, dataclasses.replace(WAYS, lease_s=0.2)
    try:
        await run(first, halves(request("a", prompt(100)), "t")[0])
        for _ in range(200):  # nobody asks the engine anything meanwhile
            if first.loop.stats.transfers.leases_expired > expired:
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError("the lease is not given up")
    finally:
        giving._config = config
    assert told(first).leases_expired == expired + 1 and told(first).leases == 0
    await nothing_left(pair)


async def test_leases_give_way_to_requests_of_the_engine_itself(pair):
    """Kept pages never stand in the way of a request that would else never run."""
    first, _, _ = pair
    for i in range(2):
        await run(first, halves(request(f"a{i}", prompt(200, i)), f"t{i}")[0])
    assert told(first).leased_pages == 24, "half of the pages at most"
    found = await asyncio.gather(*(run(first, request(f"b{i}", prompt(240, 10 + i))) for i in range(3)))
    assert all(f.finish_reason is FinishReason.LENGTH for f in found)
    await nothing_left(pair)


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_an_abort_frees_both_sides(pair, side):
    first, second, transport = pair
    transport.before = local.slow(0.05)
    one, other = halves(request("a", prompt(230), max_tokens=20), "t")
    tasks = [asyncio.create_task(run(first, one)), asyncio.create_task(run(second, other))]
    await asyncio.sleep(0.15)
    tasks[0 if side == "prefill" else 1].cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    if side == "prefill":
        assert found[1].finish_reason is FinishReason.LENGTH
    await nothing_left(pair)


async def test_a_stranger_is_not_asked(pair):
    _, second, transport = pair
    config, taking = second.loop.peers.taking._config, second.loop.peers.taking
    taking._config = dataclasses.replace(config, peers=("10.0.0.0/8", "localhost"))
    try:
        fetches = transport.fetches
        await _falls_back(pair, request("a", prompt(60)), "not_allowed")
        assert transport.fetches == fetches
    finally:
        taking._config = config


# ---- over gRPC, HTTP and a gateway ----


@contextlib.asynccontextmanager
async def served(pair, http=False):
    """Both engines behind servers: (their gRPC addresses, their HTTP URLs)."""
    transport = pair[2]
    transport.outside = GrpcTransport()
    addresses, urls, stops = [], [], []
    try:
        for engine in pair[:2]:
            server = GrpcServer("127.0.0.1", 0)
            stops.append(server)
            port = await server.start()
            service = mock_service(engine.client)
            service.kv_address = ("127.0.0.1", port)
            await server.serve(service)
            addresses.append(f"127.0.0.1:{port}")
            if http:
                stops.append(await serve_http(service, port=0))
                urls.append(stops[-1].url)
        yield addresses, urls
    finally:
        transport.outside.close()
        transport.outside = None
        for one in stops:
            await one.stop(0.0)


@contextlib.asynccontextmanager
async def behind_a_gateway(addresses, policy="always"):
    """A pool over the second engine, which has the first compute prompts."""
    helper, target = [await RemoteEngineClient.connect(address) for address in addresses]
    pool = Pool([target])
    pool.prefills = Prefills(policy, 16)
    pool.prefills.add(addresses[0], helper, target.info().model_id)
    try:
        yield pool
    finally:
        await target.close()
        await helper.close()


async def through(pool, whole):
    tokens, last = [], None
    async for output in pool.generate(whole):
        tokens += output.token_ids
        last = output
    return dataclasses.replace(last, token_ids=tuple(tokens))


async def test_a_gateway_has_prompts_computed_elsewhere(pair):
    _, second, _ = pair
    stem = prompt(60, 3)
    whole = [request(f"g{i}", stem + prompt(20 + 7 * i, i), max_tokens=5) for i in range(10)]
    expected = await alone(second, whole)
    for engine in pair[:2]:
        engine.call(engine.scheduler.kv.forget)
    before = told(second).tokens_in
    async with served(pair) as (addresses, _), behind_a_gateway(addresses) as pool:
        found = await asyncio.gather(*(through(pool, one) for one in whole))
        assert [f.token_ids for f in found] == [expected[one.request_id].token_ids for one in whole]
        assert pool.prefills.decisions == {"apart": 10} and pool.prefills.failures == 0
        assert all(one.queued == 0 for one in pool.prefills.helpers.values())
    assert told(second).tokens_in - before >= 60
    await nothing_left(pair)


async def test_a_prefill_engine_that_dies_costs_time_alone(pair):
    """Killed before it is asked, and while it computes."""
    first, second, _ = pair
    whole = request("a", prompt(200), max_tokens=5)
    expected = await run(second, dataclasses.replace(whole, request_id="expected"))
    for gone in ("before", "during"):
        second.call(second.scheduler.kv.forget)
        async with served(pair) as (addresses, _), behind_a_gateway(addresses) as pool:
            own = pool.prefills.helpers[addresses[0]].client
            if gone == "before":
                await own.close()
            task = asyncio.create_task(through(pool, dataclasses.replace(whole, request_id=gone)))
            if gone == "during":
                first.call(lambda: setattr(first.loop, "paused", True))
                await asyncio.sleep(0.2)
                await own.close()
                first.call(lambda: setattr(first.loop, "paused", False))
            found = await asyncio.wait_for(task, 30.0)
            assert found.token_ids == expected.token_ids
        await nothing_left(pair)


async def test_vllms_two_calls(pair):
    """What vLLM's proxies do, over HTTP: the first answer's kv_transfer_params, unread, into the second request."""
    second = pair[1]
    body = {"prompt": list(prompt(120)), "temperature": 0, "ignore_eos": True}
    async with served(pair, http=True) as (_, urls), httpx.AsyncClient(timeout=30) as client:
        expected = (
            await client.post(f"{urls[1]}/v1/completions", json={**body, "max_tokens": 9, "return_token_ids": True})
        ).json()
        second.call(second.scheduler.kv.forget)
        ask = {
            "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
            "remote_host": None, "remote_port": None,
        }  # fmt: skip
        reply = (
            await client.post(f"{urls[0]}/v1/completions", json={**body, "max_tokens": 1, "kv_transfer_params": ask})
        ).json()
        given = reply["kv_transfer_params"]
        assert (
            given["do_remote_prefill"] and given["remote_host"] == "127.0.0.1" and len(given["remote_request_id"]) == 32
        )
        again = {**body, "max_tokens": 9, "return_token_ids": True, "kv_transfer_params": given}
        found = (await client.post(f"{urls[1]}/v1/completions", json=again)).json()
        assert found["choices"][0]["token_ids"] == expected["choices"][0]["token_ids"]
        assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == 112
        assert "kv_transfer_params" not in found
        figures = (await client.get(f"{urls[1]}/metrics")).text
        assert "jaxserve:kv_transfer_requests_total{" in figures and 'direction="in"' in figures
        wrong = await client.post(
            f"{urls[1]}/v1/completions", json={**body, "kv_transfer_params": {"remote_port": 70000}}
        )
        assert wrong.status_code == 400
    await nothing_left(pair)


async def test_a_prefix_that_another_engine_has_is_fetched(pair):
    """No ticket: what the peer has now, of what it computed for others."""
    first, second, _ = pair
    await run(first, request("before", prompt(100)))
    whole = dataclasses.replace(
        request("a", prompt(100) + prompt(30, 7)), transfer=TransferParams(remote_prefill=True, host="prefill", port=1)
    )
    expected = await run(first, request("expected", whole.prompt_token_ids))
    first.call(first.scheduler.kv.forget)
    await run(first, request("before", prompt(100)))
    found = await run(second, whole)
    assert found.token_ids == expected.token_ids and found.num_cached_tokens == 96
    await nothing_left(pair)
