"""The endpoint picker, asked by a stub that speaks Envoy's external processing as a gateway of Kubernetes does."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf import struct_pb2

from proto.jaxserve.v1 import ext_proc_pb2 as pb
from serving.gateway import Pool
from serving.gateway.picker import PIECE_BYTES, EndpointPicker, serve_picker
from serving.gateway.prefills import Prefills
from serving.service import Limits
from tests.mock_engine import MockEngine, mock_service, until

BUFFERED, DUPLEX = 2, 4
PROMPT = "a prompt that is a good deal longer than one page of sixteen tokens"


class Envoy:
    """One request as Envoy processes it. Gives what Envoy would do with it."""

    def __init__(self, process: Any, duplex: bool = True) -> None:
        self._out: asyncio.Queue[pb.ProcessingRequest | None] = asyncio.Queue()
        self._duplex = duplex
        self._call = process(self._messages())
        self.endpoints: list[str] = []
        self.metadata: dict = {}
        self.prefiller: str | None = None
        self.refused: tuple[int, dict] | None = None
        self.body = b""

    async def _messages(self) -> AsyncIterator[pb.ProcessingRequest]:
        while (message := await self._out.get()) is not None:
            yield message

    async def request(
        self, body: bytes, headers: dict[str, str] | None = None, subset: list[str] | None = None
    ) -> Envoy:
        """Sends a request's headers and body, and takes the answer in."""
        named = [pb.HeaderValue(key=k, raw_value=v.encode()) for k, v in (headers or {}).items()]
        mode = DUPLEX if self._duplex else BUFFERED
        first = pb.ProcessingRequest(
            request_headers=pb.HttpHeaders(headers=pb.HeaderMap(headers=named), end_of_stream=not body),
            protocol_config=pb.ProtocolConfiguration(request_body_mode=mode),
        )
        if subset is not None:
            first.metadata_context.filter_metadata["envoy.lb.subset_hint"].update(
                {"x-gateway-destination-endpoint-subset": subset}
            )
        await self._out.put(first)
        if body and not self._duplex:
            assert (await self._next()).HasField("request_headers")  # before it sends what it has buffered
        if body:
            half = len(body) // 2
            pieces = [body[:half], body[half:]] if self._duplex else [body]
            for i, piece in enumerate(pieces):
                last = i == len(pieces) - 1
                await self._out.put(pb.ProcessingRequest(request_body=pb.HttpBody(body=piece, end_of_stream=last)))
        while True:
            reply = await self._next()
            if reply.HasField("immediate_response"):
                refusal = reply.immediate_response
                self.refused = refusal.status.code, json.loads(refusal.body)
                return self
            which = "request_headers" if reply.HasField("request_headers") else "request_body"
            common = getattr(reply, which).response
            for option in common.header_mutation.set_headers:
                if option.header.key == "x-gateway-destination-endpoint":
                    assert common.clear_route_cache
                    self.endpoints = option.header.raw_value.decode().split(",")
                    self.metadata = dict(reply.dynamic_metadata["envoy.lb"])
                elif option.header.key == "x-prefiller-host-port":
                    self.prefiller = option.header.raw_value.decode()
            streamed = common.body_mutation.streamed_response
            assert len(streamed.body) <= PIECE_BYTES
            self.body += streamed.body
            if not body or not self._duplex or (which == "request_body" and streamed.end_of_stream):
                return self

    async def response(self, served: str | None = None) -> dict[str, str]:
        """Sends the headers of the server's answer; what the picker adds to them."""
        message = pb.ProcessingRequest(response_headers=pb.HttpHeaders())
        if served is not None:
            message.metadata_context.filter_metadata["envoy.lb"].update(
                {"x-gateway-destination-endpoint-served": served}
            )
        await self._out.put(message)
        options = (await self._next()).response_headers.response.header_mutation.set_headers
        return {one.header.key: one.header.raw_value.decode() for one in options}

    async def end(self) -> None:
        """The last of the answer's body, and the end of the exchange."""
        await self._out.put(pb.ProcessingRequest(response_body=pb.HttpBody(body=b"done", end_of_stream=True)))
        reply = await self._next()
        if self._duplex:
            assert reply.response_body.response.body_mutation.streamed_response.body == b"done"
        await self._out.put(None)
        assert await self._call.read() is grpc.aio.EOF

    def cancel(self) -> None:
        self._call.cancel()

    async def _next(self) -> pb.ProcessingResponse:
        reply = await asyncio.wait_for(self._call.read(), 60)
        assert isinstance(reply, pb.ProcessingResponse), reply
        return reply


@contextlib.asynccontextmanager
async def _picker(count: int = 3, **options):
    engines = [MockEngine() for _ in range(count)]
    pool = Pool(engines, names=[f"10.0.0.{i}:50051" for i in range(count)])
    picker = EndpointPicker(mock_service(pool, **options), pool, 8000)  # type: ignore[arg-type]
    server, port = await serve_picker(picker, "127.0.0.1", 0, None)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield (
            engines,
            pool,
            channel.stream_stream(
                "/envoy.service.ext_proc.v3.ExternalProcessor/Process",
                pb.ProcessingRequest.SerializeToString,
                pb.ProcessingResponse.FromString,
            ),
        )
    await server.stop(0)


async def test_who_computes_the_prompt_is_said_where_somebody_else_could():
    async with _picker(1) as (engines, pool, stub):
        assert (await Envoy(stub).request(chat())).prefiller is None
        engines[0]._info = dataclasses.replace(engines[0].info(), role="decode")
        helper = MockEngine()
        helper._info = dataclasses.replace(helper.info(), role="prefill")
        pool.prefills = Prefills("always", 16)
        pool.prefills.add("10.0.1.7:50051", helper)
        assert (await Envoy(stub).request(chat(PROMPT[::-1]))).prefiller == "10.0.1.7:8000"
        short = await Envoy(stub).request(chat("hi"), {"x-prefiller-host-port": "somebody:1"})
        assert short.prefiller == "", "a client's own word does not get through"


def chat(text: str = PROMPT) -> bytes:
    return json.dumps({"model": "mock", "messages": [{"role": "user", "content": text}]}).encode()


@pytest.mark.parametrize("duplex", [True, False])
async def test_the_next_turn_goes_where_the_first_went(duplex):
    async with _picker() as (_, pool, stub):
        first = await Envoy(stub, duplex).request(chat())
        assert len(first.endpoints) == 3 and all(
            one.startswith("10.0.0.") and one.endswith(":8000") for one in first.endpoints
        )
        assert first.metadata == {"x-gateway-destination-endpoint": ",".join(first.endpoints)}
        assert first.body == (chat() if duplex else b"")
        assert sum(member.target.live for member in pool.members.values()) == 1
        await first.response()
        await first.end()
        assert sum(member.target.live for member in pool.members.values()) == 0
        again = await Envoy(stub, duplex).request(chat(PROMPT + " and more"), {"x-gateway-debug": "1"})
        assert again.endpoints[0] == first.endpoints[0]
        assert "reason=prefix" in (await again.response())["x-gateway-decision"]
        await again.end()
        completion = await Envoy(stub, duplex).request(json.dumps({"prompt": PROMPT}).encode())
        await completion.response()
        await completion.end()
        assert pool.router.decisions["cache", "prefix"] == 1 and pool.router.prompt_tokens > 3 * 60


async def test_a_long_body_comes_back_whole_in_pieces():
    async with _picker() as (_, _, stub):
        body = chat("x" * 150_000)
        found = await Envoy(stub).request(body)
        assert found.body == body and found.endpoints
        found.cancel()


async def test_the_proxys_subset_is_kept_to():
    async with _picker() as (_, _, stub):
        for hint in (["10.0.0.2:8000"], ["10.0.0.2"]):
            found = await Envoy(stub).request(chat(), subset=hint)
            assert found.endpoints == ["10.0.0.2:8000"]
        nobody = await Envoy(stub).request(chat(), subset=["10.9.9.9:8000"])
        assert nobody.refused is not None and nobody.refused[0] == 503


async def test_requests_without_a_readable_prompt_are_routed_by_load():
    async with _picker() as (_, _, stub):
        for body in (b"", b"{", b'{"prompt": 3}', b'{"messages": [3]}', b'{"messages": [{"role": 7}]}', b"[]", b"\xff"):
            found = await Envoy(stub).request(body)
            assert found.endpoints and found.refused is None, body


async def test_an_image_goes_to_a_server_that_reads_images():
    parts = [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]
    body = json.dumps({"messages": [{"role": "user", "content": parts}]}).encode()
    async with _picker() as (engines, _, stub):
        refused = (await Envoy(stub).request(body)).refused
        assert refused is not None and refused[0] == 400 and "images" in refused[1]["error"]["message"]
        engines[1]._info = dataclasses.replace(engines[1].info(), modalities=("image",))
        assert (await Envoy(stub).request(body)).endpoints == ["10.0.0.1:8000"]
        assert len((await Envoy(stub).request(chat())).endpoints) == 3


async def test_none_ready_is_503_and_too_many_429():
    limits = Limits.for_model(512, requests_per_minute=2)
    async with _picker(1, limits=limits) as (engines, _, stub):
        codes = []
        for _ in range(3):
            found = await Envoy(stub).request(chat())
            codes.append(found.refused and found.refused[0])
        assert codes == [None, None, 429]
        assert found.refused is not None and "requests a minute" in found.refused[1]["error"]["message"]
        engines[0].die()
        found = await Envoy(stub).request(b"")
        assert found.refused is not None and found.refused[0] == 503


async def test_who_served_is_where_the_prefix_is():
    async with _picker() as (_, pool, stub):
        first = await Envoy(stub).request(chat())
        await first.response(served=first.endpoints[1])
        assert pool.router.retries["proxy"] == 1
        await first.end()
        again = await Envoy(stub).request(chat())
        assert again.endpoints[0] in first.endpoints[:2]
        again.cancel()
        await until(lambda: all(member.target.live == 0 for member in pool.members.values()), "a proxy that gives up")


async def test_sessions_and_objectives_hold_for_proxies_too():
    async with _picker() as (_, _, stub):
        seen = set()
        for i in range(5):
            found = await Envoy(stub).request(chat(f"{i} other"), {"x-session-id": "alice"})
            seen.add(found.endpoints[0])
            await found.response()
            await found.end()
        assert len(seen) == 1


# Messages of Envoy's own definitions (xds-protos 1.85.0), serialized. Ours have to be the same bytes.
_SET = "12350a330a2f0a1e782d676174657761792d64657374696e6174696f6e2d656e64706f696e741a0d31302e302e302e313a383030301802"
FIRST = (
    "123a0a360a0f0a073a6d6574686f641a04504f53540a150a0c782d73657373696f6e2d69641a05616c6963650a0c0a036f6c641205706c61696e180142580a"
    "560a14656e766f792e6c622e7375627365745f68696e74123e0a3c0a25782d676174657761792d64657374696e6174696f6e2d656e64706f696e742d737562"
    "736574121332110a0f1a0d31302e302e302e313a383030305a020804"
)
SERVED = (
    "1a120a100a0e0a073a7374617475731a0332303042480a460a08656e766f792e6c62123a0a380a25782d676174657761792d64657374696e6174696f6e2d65"
    "6e64706f696e742d736572766564120f1a0d31302e302e302e313a38303030"
)
PICKED = (
    "0a3b0a39"
    + _SET
    + "280142430a410a08656e766f792e6c6212352a330a310a1e782d676174657761792d64657374696e6174696f6e2d656e64706f696e"
    "74120f1a0d31302e302e302e313a38303030"
)


def test_messages_are_envoys():
    first = pb.ProcessingRequest.FromString(bytes.fromhex(FIRST))
    assert [one.key for one in first.request_headers.headers.headers] == [":method", "x-session-id", "old"]
    assert first.request_headers.end_of_stream and first.protocol_config.request_body_mode == DUPLEX
    hint = first.metadata_context.filter_metadata["envoy.lb.subset_hint"]
    assert list(hint["x-gateway-destination-endpoint-subset"]) == ["10.0.0.1:8000"]
    served = pb.ProcessingRequest.FromString(bytes.fromhex(SERVED))
    assert served.WhichOneof("request") == "response_headers"
    assert (
        served.metadata_context.filter_metadata["envoy.lb"]["x-gateway-destination-endpoint-served"] == "10.0.0.1:8000"
    )
    for raw, which in (("22060a027b7d1001", "request_body"), ("2a080a04646f6e651001", "response_body")):
        message = pb.ProcessingRequest.FromString(bytes.fromhex(raw))
        assert message.WhichOneof("request") == which and getattr(message, which).end_of_stream
    assert pb.ProcessingRequest.FromString(bytes.fromhex("3200")).WhichOneof("request") == "request_trailers"
    assert pb.ProcessingRequest.FromString(bytes.fromhex("3a00")).WhichOneof("request") == "response_trailers"

    endpoint = pb.HeaderValue(key="x-gateway-destination-endpoint", raw_value=b"10.0.0.1:8000")
    mutation = pb.HeaderMutation(set_headers=[pb.HeaderValueOption(header=endpoint, append_action=2)])
    metadata = struct_pb2.Struct()
    metadata.update({"envoy.lb": {"x-gateway-destination-endpoint": "10.0.0.1:8000"}})
    common = pb.CommonResponse(header_mutation=mutation, clear_route_cache=True)
    picked = pb.ProcessingResponse(request_headers=pb.HeadersResponse(response=common), dynamic_metadata=metadata)
    piece = pb.BodyMutation(streamed_response=pb.StreamedBodyResponse(body=b"{}", end_of_stream=True))
    refusal = pb.ImmediateResponse(
        status=pb.HttpStatus(code=503), body=b"no", details="endpoint_picker", headers=mutation
    )
    made = {
        PICKED: picked,
        "1a040a022801": pb.ProcessingResponse(
            request_body=pb.BodyResponse(response=pb.CommonResponse(clear_route_cache=True))
        ),
        "1a0c0a0a1a081a060a027b7d1001": pb.ProcessingResponse(
            request_body=pb.BodyResponse(response=pb.CommonResponse(body_mutation=piece))
        ),
        "3a510a0308f703" + _SET + "1a026e6f2a0f656e64706f696e745f7069636b6572": pb.ProcessingResponse(
            immediate_response=refusal
        ),
        "1200": pb.ProcessingResponse(response_headers=pb.HeadersResponse()),
        "2a00": pb.ProcessingResponse(request_trailers=pb.TrailersResponse()),
        "3200": pb.ProcessingResponse(response_trailers=pb.TrailersResponse()),
    }
    for raw, message in made.items():
        assert message.SerializeToString(deterministic=True).hex() == raw
