"""A call's id and trace, in and out, and its line in the log."""

import logging

import grpc
import pytest

from proto.jaxserve.v1 import inference_pb2 as pb
from serving.frontends.grpc.client import RemoteEngineClient
from serving.metrics.logs import request_id_of_task
from serving.metrics.tracing import trace_headers_of_task
from serving.service import GenerateInput, collect
from tests.mock_engine import EmbeddingEngine, MockEngine, mock_service

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Noting(EmbeddingEngine):
    """Notes the context in which requests reach it."""

    def __init__(self) -> None:
        super().__init__("hi")
        self.seen: list[tuple[str | None, dict[str, str]]] = []

    def _note(self) -> None:
        self.seen.append((request_id_of_task.get(), dict(trace_headers_of_task.get() or {})))

    async def generate(self, request):
        self._note()
        async for output in super().generate(request):
            yield output

    async def embed(self, *args, **kwargs):
        self._note()
        return await super().embed(*args, **kwargs)


async def test_an_id_comes_back_and_names_the_request(serve):
    async with serve(MockEngine("hi")) as s:
        call = s.inference.Generate(pb.GenerateRequest(text="x"), metadata=(("x-request-id", "mine-7"),))
        messages = [message async for message in call]
        assert dict(await call.initial_metadata())["x-request-id"] == "mine-7" == messages[0].request_id
        call = s.inference.Tokenize(pb.TokenizeRequest(text="x"), metadata=(("x-request-id", "x" * 200),))
        await call
        made = dict(await call.initial_metadata())["x-request-id"]
        assert len(made) == 32 and made.isalnum()


async def test_a_failed_call_has_its_id_too(serve):
    async with serve(MockEngine("hi")) as s:
        for call in (s.inference.Generate(pb.GenerateRequest(text="")), s.inference.Embed(pb.EmbedRequest())):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call if hasattr(call, "__await__") else [m async for m in call]
            assert dict(caught.value.trailing_metadata())["x-request-id"]


async def test_id_and_trace_pass_a_gateway(serve):
    engine = Noting()
    async with serve(engine) as s:
        client = await RemoteEngineClient.connect(s.target)
        service = mock_service(client)
        request_id_of_task.set("from-http")
        trace_headers_of_task.set({"traceparent": TRACE, "tracestate": "a=b"})
        prepared = await service.prepare(GenerateInput(text="x"), service.make_params({}))
        await collect(prepared, service.generate(prepared))
        await service.embed(GenerateInput(text="x"))
        await client.close()
    assert engine.seen == [("from-http", {"traceparent": TRACE, "tracestate": "a=b"})] * 2


async def test_calls_are_logged_with_status_and_without_text(serve, caplog):
    caplog.set_level(logging.INFO, "serving.access")
    async with serve(MockEngine("the secret answer")) as s:
        assert [m async for m in s.inference.Generate(pb.GenerateRequest(text="my secret"))]
        with pytest.raises(grpc.aio.AioRpcError):
            await s.inference.Embed(pb.EmbedRequest(inputs=[pb.EmbedInput(text="my secret")]))
    lines = [record.getMessage() for record in caplog.records if record.name == "serving.access"]
    assert lines[0].startswith("gRPC Generate OK ") and lines[1].startswith("gRPC Embed UNIMPLEMENTED ")
    assert "secret" not in caplog.text
