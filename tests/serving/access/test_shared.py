"""Gateways that share keys and rates, and what they do without the Redis that holds them."""

from __future__ import annotations

import logging

import fakeredis
import pytest

from serving.access.keys import KeyRing, Role, file_line, new_secret
from serving.access.shared import KEYS, SharedKeys, SharedMeter, connect
from serving.errors import ErrorKind, RequestError


@pytest.fixture
def server():
    return fakeredis.FakeServer()


def client_of(server):
    return fakeredis.FakeAsyncRedis(server=server, decode_responses=True)


async def passes(meter: SharedMeter, name: str, count: int = 1) -> bool:
    try:
        await meter.ask(name, count)
    except RequestError as error:
        assert error.kind is ErrorKind.RESOURCE_EXHAUSTED and error.code == "rate_limit_exceeded"
        assert error.retry_after_s is not None and 0 < error.retry_after_s <= 121
        return False
    return True


async def test_a_rate_holds_over_all_gateways(server):
    gateways = [SharedMeter(client_of(server), 10) for _ in range(3)]
    passed = [await passes(gateways[i % 3], "alice") for i in range(30)]
    assert passed == [True] * 10 + [False] * 20
    assert await passes(gateways[0], "bob", 4) and await passes(gateways[1], "bob", 6)
    assert not await passes(gateways[2], "bob")


async def test_a_count_beyond_the_rate_passes_once_and_is_paid_back(server):
    meter = SharedMeter(client_of(server), 10)
    assert await passes(meter, "a", 25) and not await passes(meter, "a")


async def test_the_bucket_fills_by_the_clock_of_redis(server):
    client = client_of(server)
    meter = SharedMeter(client, 60)
    assert await passes(meter, "a", 60) and not await passes(meter, "a", 30)
    at = float(await client.hget("jaxserve:rate:a", "at"))
    await client.hset("jaxserve:rate:a", "at", str(at - 31))
    assert await passes(meter, "a", 30) and not await passes(meter, "a", 30)
    assert 0 < await client.ttl("jaxserve:rate:a") <= 300


async def test_without_a_rate_redis_is_not_asked(server):
    server.connected = False
    await SharedMeter(client_of(server), None).ask("a", 10**9)


async def test_redis_gone_each_gateway_counts_for_itself_and_later_together_again(server, caplog):
    now = [0.0]
    gateways = [SharedMeter(client_of(server), 10, lambda: now[0]) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        assert await passes(gateways[0], "a", 4)
        server.connected = False
        # The first has let 4 through already, the second none.
        assert [sum([await passes(gateway, "a") for _ in range(20)]) for gateway in gateways] == [6, 10]
        assert caplog.text.count("Redis does not answer") == 2
        server.connected = True
        assert not await passes(gateways[0], "a")  # left alone for a second
        now[0] += 1.5
        assert await passes(gateways[0], "a") and "answers again" in caplog.text


async def put(server, name: str, role: Role) -> str:
    secret = new_secret()
    _, word, digest = file_line(name, role, secret).split()
    await client_of(server).hset(KEYS, name, f"{word} {digest}")
    return secret


async def test_keys_come_and_go_without_a_restart(server, caplog):
    mine = new_secret()
    keys = SharedKeys(KeyRing.of([mine]), client_of(server))
    assert keys and keys.find(mine) is not None and not keys.has_admin
    alice, root = await put(server, "alice", Role.USER), await put(server, "root", Role.ADMIN)
    assert keys.find(alice) is None
    assert await keys.read() and keys.has_admin
    found = keys.find(alice)
    assert found is not None and (found.name, found.role) == ("alice", Role.USER)
    await client_of(server).hset(KEYS, "broken", "user sha256:nothing")
    await client_of(server).hset(KEYS, "key-1", f"admin sha256:{'0' * 64}")  # the name of one that a flag gave
    await client_of(server).hdel(KEYS, "alice")
    assert await keys.read()
    assert keys.find(alice) is None and keys.find(root) is not None and "'broken'" in caplog.text
    assert sum(key.caller.name == "key-1" for key in keys.all()) == 1 and keys.find(mine) is not None


async def test_redis_gone_the_keys_stay_and_none_known_opens_nothing(server):
    alice = await put(server, "alice", Role.USER)
    keys = SharedKeys(KeyRing(), client_of(server))
    assert bool(keys), "no key known is not the same as no key asked for"
    assert await keys.read()
    server.connected = False
    assert not await keys.read() and keys.find(alice) is not None


def test_a_url_that_is_none_is_told():
    with pytest.raises(ValueError, match="redis_url cannot be used"):
        connect("http://nowhere")
