"""Images through a gateway: it counts their tokens and routes by what is in them, and the engine reads the same from what came."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from proto.jaxserve.v1 import inference_pb2 as pb
from proto.jaxserve.v1 import transfer_pb2
from serving.engine.api.media import outline_of
from serving.engine.api.page_events import PageBatch, PagesStored
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.errors import ErrorKind, RequestError
from serving.frontends.app import serve_http
from serving.frontends.grpc.client import RemoteEngineClient
from serving.frontends.grpc.pages import events_of, messages_of
from serving.frontends.grpc.server import GrpcServer
from serving.frontends.grpc.transfer import media_from
from serving.gateway import Pool
from serving.gateway.__main__ import Gateway
from serving.gateway.flags import parse
from serving.gateway.media import media_of
from serving.gateway.page_index import Pages
from serving.media import MediaPolicy, MediaReader
from serving.routing.router import Chains
from serving.transfer.digests import chain
from serving.transfer.grpc_transport import places_of
from tests.mock_engine import PAGE_SIZE, EmbeddingEngine, MockEngine, mock_service, until
from tests.serving.media.images import PROCESSOR, ImageTemplate, asked, encoded, image_service, part, uri


def gateway_service(pool):
    reader = MediaReader(PROCESSOR, MediaPolicy(), 64, sends_on=True)
    return mock_service(pool, template=ImageTemplate(), media=reader)


SEES = ("image", "video")


@contextlib.asynccontextmanager
async def two_behind_a_gateway(make=MockEngine, *reads):
    """(the engines, their pool, a client of the gateway over HTTP). `reads`: what each reads; else both images and videos."""
    engines = [make("seen"), make("seen")]
    for engine, senses in zip(engines, reads or (SEES, SEES), strict=True):
        engine._info = dataclasses.replace(engine.info(), modalities=senses)
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for engine in engines:
            server = GrpcServer("127.0.0.1", 0)
            stack.push_async_callback(server.stop, 0.0)
            await server.start()
            await server.serve(image_service(engine))
            clients.append(await RemoteEngineClient.connect(f"127.0.0.1:{server.port}"))
            stack.push_async_callback(clients[-1].close)
        pool = Pool(clients)
        http = await serve_http(gateway_service(pool), port=0)
        stack.push_async_callback(http.stop)
        yield engines, pool, await stack.enter_async_context(httpx.AsyncClient(base_url=http.url, timeout=60))


async def say(client, *parts, **more):
    reply = await client.post("/v1/chat/completions", json={"messages": asked(*parts), "max_tokens": 4, **more})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


IMAGES = {kind: part(uri(encoded(60, 60, seed=i))) for i, kind in enumerate(("one", "other"))}
LONG = "Tell of it at length, and of all that stands beside it, please. "


async def test_an_engine_reads_what_its_gateway_has_read():
    own = MockEngine()
    alone = image_service(own)
    async with two_behind_a_gateway() as (engines, _, client):
        assert await say(client, "a", IMAGES["one"], "b", IMAGES["other"], "c", cache_salt="pepper") == "seen"
        (seen,) = [r for engine in engines for r in engine.requests]
    await _straight(alone, "a", IMAGES["one"], "b", IMAGES["other"], "c", cache_salt="pepper")
    (wanted,) = own.requests
    assert seen.prompt_token_ids == wanted.prompt_token_ids
    for one, other in zip(seen.media.items, wanted.media.items, strict=True):
        assert one.digest == other.digest and one.places_N.tolist() == other.places_N.tolist()
        np.testing.assert_array_equal(one.patches_PX, other.patches_PX)
    np.testing.assert_array_equal(seen.media.positions_3L, wanted.media.positions_3L)
    assert seen.media.origin is None, "an engine sends nothing on"


async def _straight(service, *parts, **more):
    http = await serve_http(service, port=0)
    async with httpx.AsyncClient(base_url=http.url, timeout=60) as client:
        await say(client, *parts, **more)
    await http.stop()


async def test_the_same_words_under_another_image_are_another_prompt():
    async with two_behind_a_gateway() as (engines, pool, client):
        for kind in ("one", "other", "one", "other", "one"):
            await say(client, IMAGES[kind], LONG)
        by_image = [{r.media.items[0].digest for r in engine.requests} for engine in engines]
        assert sorted(len(engine.requests) for engine in engines) == [2, 3] and [len(one) for one in by_image] == [1, 1]
        assert pool.router.matched_tokens >= 3 * PAGE_SIZE
    assert by_image[0] != by_image[1]


async def test_an_image_goes_to_engines_that_read_images():
    """Whatever else would choose another: load, a prefix, a session, somebody in front."""
    async with two_behind_a_gateway(MockEngine, (), SEES) as (engines, pool, client):
        assert pool.info().modalities == SEES
        names = list(pool.members)
        for _ in range(2):
            assert await say(client, LONG) == "seen"
            headers = {"x-session-id": "one", "x-gateway-destination-endpoint": names[0]}
            reply = await client.post(
                "/v1/chat/completions", json={"messages": asked(LONG, IMAGES["one"])}, headers=headers
            )
            assert reply.status_code == 200, reply.text
        assert all(request.media is None for request in engines[0].requests) and engines[0].requests
        assert sum(request.media is not None for request in engines[1].requests) == 2
        pool.members[names[1]].client._healthy = False  # until its next word, in a second
        reply = await client.post("/v1/chat/completions", json={"messages": asked(IMAGES["one"])})
        assert reply.status_code == 503 and "reads images" in reply.json()["error"]["message"], reply.text
        pool.remove(names[1])
        reply = await client.post("/v1/chat/completions", json={"messages": asked(IMAGES["one"])})
        assert reply.status_code == 400 and "no engine behind this gateway" in reply.json()["error"]["message"]
        assert await say(client, "only words") == "seen" and pool.info().modalities == ()


async def test_the_first_engine_that_reads_images_may_come_last(monkeypatch):
    gateway, blind, sees = Gateway(parse(["--target", "a:1", "b:1"])), MockEngine(), MockEngine()
    sees._info = dataclasses.replace(sees.info(), modalities=SEES)
    gateway._take("a:1", blind)
    gateway._service = service = SimpleNamespace(media=None)
    monkeypatch.setattr("serving.gateway.media.media_of", lambda args, info, source: info.modalities)
    gateway._take("b:1", sees)
    await until(lambda: service.media == SEES)
    assert gateway._info().modalities == SEES


async def test_what_cannot_be_read_or_done_there_is_told():
    async with two_behind_a_gateway(EmbeddingEngine) as (engines, pool, client):
        for bad in (part(uri(b"nothing")), part("https://somewhere.example/a.png")):
            reply = await client.post("/v1/chat/completions", json={"messages": asked(bad, "a")})
            assert reply.status_code == 400 and "messages[0]" in reply.json()["error"]["message"]
        reply = await client.post("/v1/embeddings", json={"messages": asked(IMAGES["one"], "a")})
        assert reply.status_code == 501 and "engines themselves" in reply.json()["error"]["message"]
        assert not engines[0].requests and not engines[1].requests
        stub = next(iter(pool.members.values())).client._inference
        for media in (pb.Media(sources=[pb.MediaSource()]), pb.Media(processor_json="[1]")):
            with pytest.raises(Exception, match="media"):
                async for _ in stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), media=media)):
                    pass
        with pytest.raises(Exception, match="token ids"):
            async for _ in stub.Generate(
                pb.GenerateRequest(text="a", media=pb.Media(sources=[pb.MediaSource(data=b"a")]))
            ):
                pass


def test_a_gateway_before_engines_without_towers_reads_no_images():
    args = parse(["--target", "127.0.0.1:1", "--limit-mm-per-prompt", '{"image": 2}'])
    assert media_of(args, MockEngine().info(), None) is None  # type: ignore[arg-type]


# ---- what stands in a sequence that travels ----


def test_images_are_part_of_what_a_page_is_and_come_over_the_wire():
    tokens, size = tuple(range(64)), 8
    places = [np.r_[5:11, 40:44].astype(np.int32), np.arange(50, 60, dtype=np.int32)]
    media = outline_of([(bytes([i]) * 32, p) for i, p in enumerate(places)], 64)
    other = outline_of([(bytes([i, 1]) * 16, p) for i, p in enumerate(places)], 64)

    def pages(of):
        return chain(b"i", tokens, size, None, None, of)

    assert len(set(pages(media)) & set(pages(other))) == 0 and pages(media)[0] != pages(None)[0]
    later = outline_of([(b"\0" * 32, places[0]), (b"\7" * 32, places[1])], 64)
    assert [a == b for a, b in zip(pages(media), pages(later), strict=True)] == [True] * 6 + [False] * 2
    # The first ends behind what is asked for; a page between its parts is its own too.
    request = transfer_pb2.FetchRequest(token_ids=tokens[:32], tokens=32, media=list(places_of(media)))
    came = media_from(request)
    assert came is not None and chain(b"i", tokens[:32], size, None, None, came) == pages(media)[:4]
    assert media.identity != other.identity and media.identity == media.outline().identity


@pytest.mark.parametrize("runs", [[], [3], [5, 0], [8, 2, 4, 1], [0, 2**31], [2**32 - 1, 1]])
def test_places_that_no_sequence_has_are_refused(runs):
    one = transfer_pb2.MediaPlaces(digest=b"\0" * 32, runs=runs)
    with pytest.raises(RequestError) as error:
        media_from(transfer_pb2.FetchRequest(token_ids=[1] * 32, media=[one]))
    assert error.value.kind is ErrorKind.INVALID_ARGUMENT


def test_pages_with_images_are_told_to_gateways_and_other_routers():
    media = outline_of([(b"\1" * 32, np.arange(2, 6, dtype=np.int32))], 8)
    content = media.standing(range(8))
    assert (content[2:6] < 0).all() and content[[0, 1, 6, 7]].tolist() == [0, 1, 6, 7]
    event = PagesStored((b"a" * 16,), None, content.astype("<i4").tobytes(), 8, None, None, 0, None, 0)
    (message,) = messages_of(PageBatch(0, 0.0, (event,)), "log")
    assert events_of(message) == [event]
    pages = Pages()
    pages.apply(events_of(message))
    request = EngineRequest("a", tuple(range(8)), SamplingParams(), media=media)
    plain = EngineRequest("b", tuple(range(8)), SamplingParams())
    assert [pages.prefixes.match(Chains(one).of(8)) for one in (request, plain)] == [1, 0]
