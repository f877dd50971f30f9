"""Recurrent layers: the state behind the prompt travels with the pages, and without it they are of no use."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from serving.engine.api.peers.stats import REASONS
from serving.engine.api.peers.transfers import STATE
from tests.serving.engine.test_engine import run, settle
from tests.serving.engine.test_hybrid import hybrid_engine
from tests.serving.transfer import local
from tests.serving.transfer.test_two_engines import WAYS, P, halves, prompt, request, told


@pytest.fixture(scope="module")
def pair():
    transport = local.LocalTransport()
    first = hybrid_engine(transfers=dataclasses.replace(WAYS, role="prefill"))
    second = hybrid_engine(transfers=dataclasses.replace(WAYS, role="decode"), transport=transport)
    transport.engines = {P: first}
    yield first, second, transport
    for engine in (first, second):
        for manager in engine.call(lambda engine=engine: engine.scheduler.kv.managers):
            engine.call(lambda manager=manager: manager.snapshots.check([]))
        engine.shutdown()
        engine.runner.guard.check()


async def apart(pair, whole):
    one, other = halves(whole, f"ticket {whole.request_id}")
    return (await asyncio.gather(run(pair[0], one), run(pair[1], other)))[1]


async def test_states_travel(pair):
    whole = [request(f"r{i}", prompt(20 + 13 * i, i), max_tokens=10) for i in range(7)]
    expected = [await run(pair[1], dataclasses.replace(one, request_id=f"x{i}")) for i, one in enumerate(whole)]
    for engine in pair[:2]:
        engine.call(engine.scheduler.kv.forget)
    found = await asyncio.gather(*(apart(pair, one) for one in whole))
    assert [f.token_ids for f in found] == [e.token_ids for e in expected]
    assert told(pair[1]).tokens_in > 200
    for engine in pair[:2]:
        await settle(engine)


async def test_a_state_is_kept_with_its_lease(pair):
    """Whatever the prefill engine computes before the decode engine comes."""
    first, second, _ = pair
    whole = request("a", prompt(90, 70), max_tokens=10)
    expected = await run(second, dataclasses.replace(whole, request_id="x"))
    for engine in pair[:2]:
        engine.call(engine.scheduler.kv.forget)
    one, other = halves(whole, "t")
    await run(first, one)
    for i in range(5):  # more snapshots than there are rows
        await run(first, request(f"f{i}", prompt(100, 80 + i)))
    found = await run(second, other)
    assert found.token_ids == expected.token_ids and found.num_cached_tokens == 88
    for engine in pair[:2]:
        await settle(engine)


@pytest.mark.parametrize("what", ["spoilt", "lost"])
async def test_a_state_that_does_not_come_whole(pair, what):
    first, second, transport = pair
    whole = request("a", prompt(90, 50), max_tokens=10)
    expected = await run(second, dataclasses.replace(whole, request_id="x"))
    for engine in pair[:2]:
        engine.call(engine.scheduler.kv.forget)
    transport.before = local.spoilt(STATE) if what == "spoilt" else local.cut_at(STATE)
    reason = REASONS.index("wrong_digest" if what == "spoilt" else "unreachable")
    before = told(second).fallbacks[reason]
    try:
        found = await apart(pair, whole)
        assert found.token_ids == expected.token_ids and found.num_cached_tokens == 0
        assert told(second).fallbacks[reason] == before + 1
        again = await run(second, dataclasses.replace(whole, request_id="again"))
        assert again.token_ids == expected.token_ids, "nothing of it was kept as what it is not"
    finally:
        transport.before = lambda parcel: parcel
        for engine in (first, second):
            await settle(engine)
