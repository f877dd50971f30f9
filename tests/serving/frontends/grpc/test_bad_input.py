"""Each kind of bad input gets its status and a sentence, and the server goes on serving."""

import math

import grpc
import pytest

from proto.jaxserve.v1 import control_pb2, sampling_pb2
from proto.jaxserve.v1 import inference_pb2 as pb
from serving.service import Limits
from tests.mock_engine import VOCAB, MockEngine, until

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
CONTEXT = 64


def text(prompt="hi", **params):
    return pb.GenerateRequest(text=prompt, sampling_params=sampling_pb2.SamplingParams(**params))


def chat(*turns, **more):
    return pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(**turn) for turn in turns], **more))


def tokens(*ids):
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids))


BAD = {
    "no prompt": (pb.GenerateRequest(), INVALID, "exactly one prompt"),
    "empty text": (text(""), INVALID, "empty"),
    "no token ids": (tokens(), INVALID, "empty"),
    "no messages": (chat(), INVALID, "empty"),
    "message without content": (chat({"role": "user"}), INVALID, "messages[0].content"),
    "message without role": (chat({"content": "hi"}), INVALID, "messages[0].role"),
    "prompt longer than the context": (text("x" * CONTEXT), INVALID, f"maximum context length is {CONTEXT} tokens"),
    "prompt far longer than the context": (text("x" * 10**6), INVALID, f"maximum context length is {CONTEXT} tokens"),
    "token ids longer than the context": (tokens(*[1] * CONTEXT), INVALID, "context"),
    "token id out of range": (tokens(1, VOCAB), INVALID, f"0 to {VOCAB - 1}"),
    "token id far out of range": (tokens(2**32 - 1), INVALID, "4294967295"),
    "max_tokens 0": (text(max_tokens=0), INVALID, "max_tokens must be between 1"),
    "max_tokens -1": (text(max_tokens=-1), INVALID, "max_tokens"),
    "max_tokens huge": (text(max_tokens=10**9), INVALID, "maximum context length"),
    "max_tokens beyond 32 bits": (text(max_tokens=10**15), INVALID, "max_tokens"),
    "max_tokens one too many": (text("hi", max_tokens=CONTEXT - 2), INVALID, "you requested 65 tokens"),
    "min_tokens more than the context": (text(min_tokens=1000), INVALID, "min_tokens"),
    "temperature -1": (text(temperature=-1), INVALID, "temperature must be at least 0"),
    "temperature NaN": (text(temperature=math.nan), INVALID, "temperature"),
    "temperature infinite": (text(temperature=math.inf), INVALID, "temperature"),
    "top_p 2": (text(top_p=2), INVALID, "top_p must be more than 0 and at most 1"),
    "top_p 0": (text(top_p=0), INVALID, "top_p"),
    "top_k -2": (text(top_k=-2), INVALID, "top_k"),
    "min_p 1.5": (text(min_p=1.5), INVALID, "min_p"),
    "n 0": (text(n=0), INVALID, "n must be"),
    "n 10^9": (text(n=10**9), INVALID, "n must be between 1 and 128"),
    "n 2 greedy": (text(n=2, temperature=0), INVALID, "greedy"),
    "logprobs 21": (text(logprobs=21), INVALID, "logprobs"),
    "repetition_penalty 0": (text(repetition_penalty=0), INVALID, "repetition_penalty"),
    "presence_penalty 3": (text(presence_penalty=3), INVALID, "presence_penalty"),
    "empty stop string": (text(stop=[""]), INVALID, "stop"),
    "too many stop strings": (text(stop=["x"] * 65), INVALID, "stop has 65"),
    "stop strings without text": (text(stop=["x"], detokenize=False), INVALID, "detokenize"),
    "stop token out of range": (text(stop_token_ids=[VOCAB]), INVALID, "stop_token_ids"),
    "logit_bias out of range": (text(logit_bias={VOCAB: 1.0}), INVALID, "logit_bias"),
    "logit_bias NaN": (text(logit_bias={1: math.nan}), INVALID, "logit_bias"),
    "allowed_token_ids out of range": (text(allowed_token_ids=[VOCAB]), INVALID, "allowed_token_ids"),
    "empty structured_outputs": (
        text(structured_outputs=sampling_pb2.StructuredOutputs()), INVALID, "structured_outputs"),
    "huge grammar": (
        text(structured_outputs=sampling_pb2.StructuredOutputs(regex="a" * 300_000)), INVALID, "structured_outputs has"),
    "unknown model": (pb.GenerateRequest(text="hi", model="gpt-99"), NOT_FOUND, "'gpt-99' does not exist"),
    "long model name": (pb.GenerateRequest(text="hi", model="m" * 1000), INVALID, "model has 1000"),
    "long request id": (pb.GenerateRequest(text="hi", request_id="r" * 1000), INVALID, "request_id"),
    "request id with a line end": (pb.GenerateRequest(text="hi", request_id="a\nb"), INVALID, "printable"),
    "timeout 0": (pb.GenerateRequest(text="hi", timeout_s=0), INVALID, "timeout"),
    "timeout NaN": (pb.GenerateRequest(text="hi", timeout_s=math.nan), INVALID, "timeout"),
    "truncate 0": (pb.GenerateRequest(text="hi", truncate_prompt_tokens=0), INVALID, "truncate_prompt_tokens"),
    "tool that is not JSON": (
        chat({"role": "user", "content": "x"}, tools=[pb.Tool(name="f", parameters_json="{")]), INVALID, "not valid JSON"),
    "tool that is nested too deeply": (
        chat({"role": "user", "content": "x"}, tools=[pb.Tool(name="f", parameters_json="[" * 5000)]), INVALID, "nested"),
    "too many messages": (chat(*[{"role": "user", "content": ""}] * 3000), INVALID, "chat.messages has 3000 entries"),
    "far too many messages": (chat(*[{"role": "u"}] * 40_000), INVALID, "chat.messages has 40000"),
    "template variable that is an argument": (
        chat({"role": "user", "content": "x"}, chat_template_kwargs={"messages": pb.Scalar(int_value=1)}), INVALID,
        "cannot set 'messages'"),
}  # fmt: skip


@pytest.fixture
async def server(serve):
    async with serve(MockEngine("fine", max_model_len=CONTEXT)) as running:
        yield running


async def still_serves(running):
    messages = [m async for m in running.inference.Generate(text())]
    assert "".join(m.text for m in messages) == "fine"
    await until(lambda: not running.engine.live and not running.service.num_live, "nothing is left behind")


async def failure(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


@pytest.mark.parametrize("case", BAD)
async def test_bad_request(server, case):
    request, status, sentence = BAD[case]
    error = await failure(server.inference.Generate(request))
    assert (error.code(), sentence in error.details()) == (status, True), error.details()
    assert "Traceback" not in error.details() and len(error.details()) < 600
    assert server.engine.requests == [], "it never reached the engine"
    await still_serves(server)


async def test_the_field_at_fault_is_named_in_the_trailing_metadata(server):
    error = await failure(server.inference.Generate(text(top_p=2)))
    assert dict(error.trailing_metadata())["jaxserve-error-param"] == "top_p"


async def test_invalid_utf8(server):
    raw = server.channel.unary_stream("/jaxserve.v1.Inference/Generate")
    error = await failure(raw(b"\x0a\x02\xff\xfe"))  # field 1 (text), two bytes that are not UTF-8
    assert error.code() == INVALID and "UTF-8" in error.details()
    await still_serves(server)


async def test_garbage_and_half_a_message(server):
    unary = server.channel.unary_unary("/jaxserve.v1.Control/Abort")
    for data in (b"\xff" * 20, control_pb2.AbortRequest(request_id="abcdef").SerializeToString()[:-2]):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unary(data)
        assert caught.value.code() == INVALID
    await still_serves(server)


async def test_a_message_that_inflates_is_refused_before_it_does(server):
    """gRPC bounds what a message has when it arrives, and inflates it then, asking for no key: 40 MB come as 40 kB here."""
    async with grpc.aio.insecure_channel(server.target, compression=grpc.Compression.Gzip) as channel:
        for method in ("Inference/Tokenize", "Control/GetServerInfo"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/jaxserve.v1.{method}")(bytes(40 * 2**20))
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED, method
    await still_serves(server)


async def test_message_of_100_mb(server):
    raw = server.channel.unary_stream("/jaxserve.v1.Inference/Generate")
    error = await failure(raw(bytes(100 * 2**20)))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert Limits.for_model(CONTEXT).max_body_bytes < 100 * 2**20
    await still_serves(server)


async def test_unknown_method(server):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.channel.unary_unary("/jaxserve.v1.Inference/Nope")(b"")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_tokenize_and_detokenize_refuse_too(server):
    for call in (
        server.inference.Tokenize(pb.TokenizeRequest()),
        server.inference.Tokenize(pb.TokenizeRequest(text="")),
        server.inference.Detokenize(pb.DetokenizeRequest(token_ids=[VOCAB])),
        server.control.Abort(control_pb2.AbortRequest()),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == INVALID
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.control.GetModelInfo(control_pb2.GetModelInfoRequest(model="nope"))
    assert caught.value.code() == NOT_FOUND


async def test_a_bad_request_hurts_only_itself(serve):
    async with serve(MockEngine("x" * 40, max_model_len=CONTEXT, step_s=0.002)) as s:
        good = s.inference.Generate(text())
        first = await anext(aiter(good))
        for request, status, _ in BAD.values():
            assert (await failure(s.inference.Generate(request))).code() == status
        rest = [m async for m in good]
    assert first.text + "".join(m.text for m in rest) == "x" * 40
