"""Dropped calls, deadlines, aborts, drain, death; health and reflection."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from proto.jaxserve.v1 import control_pb2, inference_pb2_grpc, sampling_pb2
from proto.jaxserve.v1 import inference_pb2 as pb
from serving.errors import ErrorKind
from serving.frontends.grpc.server import SERVICES, GrpcServer
from serving.service import Limits
from tests.mock_engine import MockEngine, mock_service, until

ENDLESS = pb.GenerateRequest(
    text="hi", request_id="endless", sampling_params=sampling_pb2.SamplingParams(ignore_eos=True)
)
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def slow_engine(**kwargs):
    return MockEngine("word ", step_s=0.005, max_model_len=100_000, **kwargs)


async def status_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value.code()


async def test_a_cancelled_call_frees_the_engine(serve):
    async with serve(slow_engine()) as s:
        free = s.engine.stats().num_pages_free
        call = s.inference.Generate(ENDLESS)
        assert (await anext(aiter(call))).text
        assert s.engine.stats().num_pages_free < free
        call.cancel()
        await until(lambda: len(s.engine.aborted) == 1 and not s.engine.live, "the request left the engine")
        assert s.engine.stats().num_pages_free == free
        assert s.service.num_live == 0


async def test_a_closed_connection_frees_every_completion(serve):
    async with serve(slow_engine()) as s:
        async with grpc.aio.insecure_channel(s.target) as channel:
            from proto.jaxserve.v1 import inference_pb2_grpc

            request = pb.GenerateRequest()
            request.CopyFrom(ENDLESS)
            request.sampling_params.n = 3
            call = inference_pb2_grpc.InferenceStub(channel).Generate(request)
            assert (await anext(aiter(call))).text
            await until(lambda: len(s.engine.live) == 3, "three completions run")
        await until(lambda: len(s.engine.aborted) == 3 and not s.engine.live, "they left")


async def test_the_calls_deadline_aborts(serve):
    async with serve(slow_engine()) as s:
        assert await status_of(s.inference.Generate(ENDLESS, timeout=0.2)) == grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: not s.engine.live, "the request left the engine")
        assert s.engine.requests[0].deadline is not None


async def test_the_requests_own_timeouts(serve):
    async with serve(slow_engine()) as s:
        for name in ("timeout_s", "ttft_timeout_s"):
            request = pb.GenerateRequest()
            request.CopyFrom(ENDLESS)
            setattr(request, name, 0.1 if name == "timeout_s" else 1e-9)
            assert await status_of(s.inference.Generate(request)) == grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: not s.engine.live, "the request left the engine")


async def test_abort_by_name(serve):
    async with serve(slow_engine()) as s:
        call = s.inference.Generate(ENDLESS)
        await anext(aiter(call))
        assert (await s.control.Abort(control_pb2.AbortRequest(request_id="endless"))).found
        messages = [m async for m in call]
        assert messages[-1].finish_reason == pb.FINISH_REASON_ABORT
        assert not (await s.control.Abort(control_pb2.AbortRequest(request_id="endless"))).found


async def test_a_full_queue_is_resource_exhausted_and_says_when_to_come_back(serve):
    async with serve(slow_engine(max_live=1)) as s:
        first = s.inference.Generate(ENDLESS)
        await anext(aiter(first))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await s.inference.Generate(pb.GenerateRequest(text="x")).read()
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(caught.value.trailing_metadata())["jaxserve-retry-after-ms"] == "1000"
        first.cancel()


async def test_one_failing_request_fails_alone(serve):
    async with serve(MockEngine("abcdef", step_s=0.002)) as s:
        s.engine.fail_next = "its logits became NaN"
        bad, good = (
            s.inference.Generate(pb.GenerateRequest(text="1")),
            s.inference.Generate(pb.GenerateRequest(text="2")),
        )
        results = await asyncio.gather(*(collect(c) for c in (bad, good)))
    failed = [r for r in results if r[1] is not None]
    assert [(text, error.code(), error.details()) for text, error in failed] == [
        ("ab", grpc.StatusCode.INTERNAL, "its logits became NaN")
    ]
    assert [text for text, error in results if error is None] == ["abcdef"]


async def collect(call):
    text = ""
    try:
        async for message in call:
            text += message.text
    except grpc.aio.AioRpcError as error:
        return text, error
    return text, None


async def test_an_exception_of_ours_is_internal_without_its_text(serve, monkeypatch, caplog):
    async with serve() as s:
        monkeypatch.setattr(s.service, "make_params", lambda given: 1 / 0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await s.inference.Generate(pb.GenerateRequest(text="x")).read()
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "division" not in caught.value.details()
    assert "ZeroDivisionError" in caplog.text


async def test_draining_refuses_the_new_and_finishes_the_old(serve):
    async with serve(MockEngine("a long answer " * 5, step_s=0.005)) as s:
        health = health_pb2_grpc.HealthStub(s.channel)
        old = s.inference.Generate(pb.GenerateRequest(text="x"))
        first = await anext(aiter(old))
        s.service.start_draining()
        await s.server.drain()
        assert (await health.Check(health_pb2.HealthCheckRequest(service=SERVICES[0]))).status == NOT_SERVING
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING, "the process lives"
        assert await status_of(s.inference.Generate(pb.GenerateRequest(text="x"))) == grpc.StatusCode.UNAVAILABLE
        assert not await s.service.wait_idle(0.01)
        rest = [m async for m in old]
        assert first.text + "".join(m.text for m in rest) == "a long answer " * 5
        assert await s.service.wait_idle(5)


async def test_a_dead_engine_is_unavailable(serve):
    async with serve(slow_engine()) as s:
        call = s.inference.Generate(ENDLESS)
        await anext(aiter(call))
        s.engine.die()
        assert await status_of(call) == grpc.StatusCode.UNAVAILABLE
        assert await status_of(s.inference.Generate(pb.GenerateRequest(text="x"))) == grpc.StatusCode.UNAVAILABLE


async def test_before_there_is_a_model():
    server = GrpcServer("127.0.0.1", 0)
    port = await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
            assert (await health.Check(health_pb2.HealthCheckRequest(service=SERVICES[0]))).status == NOT_SERVING
            info = channel.unary_unary("/jaxserve.v1.Control/GetServerInfo")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await info(b"")
            assert caught.value.code().name == ErrorKind.UNAVAILABLE.grpc_status
    finally:
        await server.stop()


async def test_a_taken_port_is_an_error_in_words(serve):
    async with serve() as s:
        second = GrpcServer("127.0.0.1", s.server.port)
        with pytest.raises(OSError, match="--grpc-port"):
            await second.start()


async def test_health_and_info(serve):
    async with serve(aliases=["alias"]) as s:
        health = health_pb2_grpc.HealthStub(s.channel)
        for name in ("", *SERVICES):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=name))).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="jaxserve.v1.Nope"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        model = await s.control.GetModelInfo(control_pb2.GetModelInfoRequest())
        server = await s.control.GetServerInfo(control_pb2.GetServerInfoRequest())
    assert (model.id, list(model.names)) == ("mock", ["mock", "alias", "default", "mock-1b"])
    assert (model.vocab_size, model.max_model_len, model.has_chat_template) == (264, 512, True)
    assert (server.platform, server.draining, server.num_pages_free) == ("cpu", False, server.num_pages_total)


async def test_reflection_lists_and_describes_the_services(serve):
    async with serve() as s:
        stub = reflection_pb2_grpc.ServerReflectionStub(s.channel)

        async def ask():
            yield reflection_pb2.ServerReflectionRequest(list_services="")
            yield reflection_pb2.ServerReflectionRequest(file_containing_symbol="jaxserve.v1.Inference")

        listed, described = [reply async for reply in stub.ServerReflectionInfo(ask())]
    names = {service.name for service in listed.list_services_response.service}
    assert {*SERVICES, "grpc.health.v1.Health"} <= names
    assert len(described.file_descriptor_response.file_descriptor_proto) >= 1


async def test_a_client_that_reads_nothing_is_given_up_and_its_request_ended():
    """Flow control stops the server's writes once the client's window is full."""
    engine = MockEngine(reply="word " * 400, max_model_len=10**6)
    limits = Limits(stalled_reader_s=0.4, max_prompt_chars=10**6)
    server = GrpcServer(port=0, limits=limits)
    await server.start()
    await server.serve(mock_service(engine, limits=limits))
    options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=options) as channel:
        params = sampling_pb2.SamplingParams(max_tokens=500_000, ignore_eos=True)
        call = inference_pb2_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="a", sampling_params=params))
        await call.read()
        await until(lambda: not engine.live, "it was given up")
        assert engine.aborted and engine.steps < 500_000
        call.cancel()
    await server.stop()
