"""A gateway that goes by what engines tell of their pages, over gRPC."""

from __future__ import annotations

import asyncio

import pytest

from serving.access import Access, KeyRing
from serving.engine.api.page_events import PagesCleared, PagesRemoved, PagesStored
from serving.engine.cache.page_log import PageLog
from serving.frontends.grpc import pages as wire
from serving.frontends.grpc.client import RemoteEngineClient
from serving.frontends.grpc.server import GrpcServer
from serving.gateway.page_index import Pages, follow
from serving.routing.prefixes import RememberedPrefixes, ToldPrefixes, chain
from serving.routing.router import Router
from tests.mock_engine import MockEngine, mock_service, until


def stored(tokens, names, parent=None, **more) -> PagesStored:
    raw = b"".join(token.to_bytes(4, "little") for token in tokens)
    return PagesStored(tuple(names), parent, raw, 4, **more)


class _Telling(MockEngine):
    page_events: PageLog | None = None


async def _server(log: PageLog | None, **options):
    engine = _Telling()
    engine.page_events = log
    server = GrpcServer("127.0.0.1", options.pop("port", 0), **options)
    await server.start()
    await server.serve(mock_service(engine))
    return server


async def test_the_router_knows_what_the_engine_has(monkeypatch):
    monkeypatch.setattr("serving.gateway.page_index.AGAIN_S", 0.02)
    monkeypatch.setattr(wire, "MAX_EVENTS", 2)
    log, router, tokens = PageLog(), Router(), list(range(16))
    log.add(stored(tokens[:8], [b"a", b"b"]))
    log.tell()
    server = await _server(log)
    client = await RemoteEngineClient.connect(f"127.0.0.1:{server.port}")
    router.add("t", 4)
    following = asyncio.create_task(follow("t", client, router))
    ours = chain((None, None), tokens, 4)

    def known() -> int:
        return router.prefixes("t").match(ours)

    try:
        await until(lambda: known() == 2, "what was there before")
        log.add(stored(tokens[8:], [b"c", b"d"], b"b"))
        log.add(stored(tokens, [b"e", b"f", b"g", b"h"], adapter="x"))
        log.tell()
        await until(lambda: known() == 4 and len(router.prefixes("t")) == 8)
        log.add(PagesRemoved((b"d",)))
        log.tell()
        await until(lambda: known() == 3)
        port = server.port
        await server.stop(0.0)  # the server is started anew, with another log
        other = PageLog()
        other.add(stored(tokens[:4], [b"z"]))
        other.tell()
        server = await _server(other, port=port)
        await until(lambda: known() == 1, "the new log", 20)
        other.add(PagesCleared())
        other.tell()
        await until(lambda: known() == 0)
    finally:
        following.cancel()
        await client.close()
        await server.stop(0.0)


@pytest.mark.parametrize("keyed", [False, True])
async def test_an_engine_that_does_not_tell_is_remembered(keyed):
    access = Access(KeyRing.of(["sk-user-0123456789abcdef"], [])) if keyed else None
    server = await _server(PageLog() if keyed else None, access=access)
    key = "sk-user-0123456789abcdef" if keyed else None
    client = await RemoteEngineClient.connect(f"127.0.0.1:{server.port}", api_key=key)
    router = Router()
    router.add("t", 4)
    try:
        await asyncio.wait_for(follow("t", client, router), 60)  # a key of a user may not see what others send
        assert isinstance(router.prefixes("t"), RememberedPrefixes)
    finally:
        await client.close()
        await server.stop(0.0)


def test_of_several_groups_the_one_that_sees_everything_counts():
    pages, tokens = Pages(), list(range(8))
    pages.apply([PagesCleared(), stored(tokens, [b"w1", b"w2"], window=16, group=0)])
    assert isinstance(pages.prefixes, ToldPrefixes)
    pages.apply([stored(tokens, [b"a", b"b"], group=1), stored(tokens, [b"w3"], window=16, group=0)])
    ours = chain((None, None), tokens, 4)
    assert pages.prefixes.match(ours) == 2
    pages.apply([PagesRemoved((b"w1", b"w2"), group=0), PagesRemoved((b"b",), group=1)])
    assert pages.prefixes.match(ours) == 1
    pages.apply([stored(tokens[:4], [b"a"], group=1, replica=1), PagesCleared(0)])
    assert pages.prefixes.match(ours) == 1  # the other replica has it
    pages.apply([PagesCleared(1)])
    assert pages.prefixes.match(ours) == 0
