"""HTTP bodies and gRPC messages, through the whole front ends over an engine that answers at once.

Whatever comes, the reply is no 5xx (501, what this server cannot do, aside), says nothing internal, and leaves nothing running.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import pathlib
import random
from collections.abc import Iterable
from typing import Any

import grpc

from proto.jaxserve.v1 import control_pb2, inference_pb2, sampling_pb2
from serving.frontends.app import create_app, serve_http
from serving.frontends.grpc.server import GrpcServer
from serving.frontends.http.direct import post
from serving.service import Limits
from tests.fuzz.mutate import dump, many, mutate_bytes, mutate_json, random_json
from tests.fuzz.run import CASE_LIMIT_S, Case
from tests.mock_engine import ClassifyingEngine, EmbeddingEngine, MockEngine, ScoringEngine, mock_service

USER = {"role": "user", "content": "hi"}
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
SAMPLING = {
    "max_tokens": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "n": 1, "seed": 3, "stop": ["x"], "logprobs": None,
    "logit_bias": {"5": 1.5}, "presence_penalty": 0.1, "min_tokens": 1, "stop_token_ids": [3], "ignore_eos": False, "user": "u",
    "truncate_prompt_tokens": 10, "bad_words": ["no"], "cache_salt": "s", "priority": 0, "stream": False,
}  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "default", "prompt": "hello", "echo": False, "suffix": None, **SAMPLING},
    "/v1/chat/completions": {
        "model": "default", "messages": [{"role": "system", "content": "s"}, USER], "tools": [TOOL], "tool_choice": "none",
        "response_format": {"type": "text"}, "stream_options": None, "chat_template_kwargs": {"x": 1}, **SAMPLING,
    },
    "/v1/responses": {"model": "default", "input": [{"role": "user", "content": "x"}], "max_output_tokens": 4, "instructions": "i"},
    "/v1/embeddings": {"model": "default", "input": ["a", "b"], "encoding_format": "float", "dimensions": 2},
    "/tokenize": {"model": "default", "prompt": "a", "add_special_tokens": True},
    "/detokenize": {"model": "default", "tokens": [1, 2, 3]},
    "/rerank": {"model": "default", "query": "a", "documents": ["b", {"text": "c"}], "top_n": 1},
    "/v1/score": {"model": "default", "text_1": "a", "text_2": ["b", "c"], "truncate_prompt_tokens": 5},
    "/classify": {"model": "default", "input": ["a", "b"], "use_activation": True, "truncate_prompt_tokens": 5},
    "/v2/embed": {"model": "default", "texts": ["a"], "embedding_types": ["float"], "truncate": "END", "input_type": "query"},
    "/v1/responses/input_tokens": {"model": "default", "input": "x", "tools": [], "reasoning": {"effort": "low"}},
}  # fmt: skip
LIMITS = Limits(max_body_bytes=256 * 1024, grammar_timeout_s=2.0)


class AbleEngine(EmbeddingEngine):
    """Does whatever any engine does."""

    def __init__(self) -> None:
        super().__init__(reply="Hello", max_model_len=256)
        self._info = dataclasses.replace(
            self._info, tasks=("generate", "embed", "score", "classify"), labels=("even", "odd")
        )
        self.scorer, self.classifier = ScoringEngine(), ClassifyingEngine()


def _service() -> tuple[MockEngine, Any]:
    engine = AbleEngine()
    return engine, mock_service(engine, limits=LIMITS)


def http_bodies(folder: pathlib.Path) -> Case:
    """POST bodies, at the ASGI application: routing, validation, limits, errors."""
    loop = asyncio.new_event_loop()

    async def make() -> tuple[MockEngine, Any]:
        engine, service = _service()
        return engine, create_app(service, page=False)

    engine, app = loop.run_until_complete(make())

    def case(rng: random.Random) -> Iterable[str]:
        path = rng.choice(list(BODIES))
        value = mutate_json(rng, BODIES[path]) if rng.random() < 0.95 else random_json(rng, 4)
        if rng.random() < 0.05:
            value = many(rng, BODIES[path])
        body = dump(rng, value)
        kind = rng.choice(
            (b"application/json",) * 12 + (b"text/plain", b"", b"application/json; charset=utf-16", b"\xff")
        )
        headers = ((b"content-type", kind), (b"content-length", str(len(body)).encode()))
        status, reply = loop.run_until_complete(post(app, path, body, headers))
        text = reply.decode("utf-8", "replace")
        assert status < 500 or status == 501, f"{path} {status}: {text[:300]}"
        assert not engine.live, "a request is still live"
        return [text] if status != 200 else []

    return case


GENERATE = inference_pb2.GenerateRequest(
    text="hello",
    sampling_params=sampling_pb2.SamplingParams(max_tokens=4, temperature=0.5, top_k=3, stop=["x"], stop_token_ids=[3]),
    model="default", request_id="r", priority=1, timeout_s=5.0, cache_salt="s", tenant="t",
)  # fmt: skip
CHAT = inference_pb2.GenerateRequest(
    chat=inference_pb2.Chat(
        messages=[inference_pb2.ChatMessage(role="user", content="hi")],
        tools=[inference_pb2.Tool(name="f", parameters_json="{}")],
        chat_template_kwargs={"a": inference_pb2.Scalar(int_value=1)},
    ),
    sampling_params=sampling_pb2.SamplingParams(max_tokens=3),
)
READ = inference_pb2.EmbedInput(token_ids=inference_pb2.TokenIds(ids=[1, 2, 3]))
MESSAGES = {
    "/jaxserve.v1.Inference/Generate": [GENERATE, CHAT],
    "/jaxserve.v1.Inference/Tokenize": [inference_pb2.TokenizeRequest(text="a b", model="default")],
    "/jaxserve.v1.Inference/Detokenize": [inference_pb2.DetokenizeRequest(token_ids=[1, 2, 300], model="default")],
    "/jaxserve.v1.Inference/Embed": [
        inference_pb2.EmbedRequest(inputs=[READ, inference_pb2.EmbedInput(text="a b")], pooling="mean", dimensions=2)
    ],
    "/jaxserve.v1.Inference/Classify": [
        inference_pb2.ClassifyRequest(inputs=[READ], raw=True, truncate_prompt_tokens=3)
    ],
    "/jaxserve.v1.Inference/Score": [
        inference_pb2.ScoreRequest(
            pairs=[
                inference_pb2.ScorePair(texts=inference_pb2.TextPair(first="a", second="b")),
                inference_pb2.ScorePair(tokens=inference_pb2.TokenPair(token_ids=[1, 2], segment_ids=[0, 1])),
            ]
        )
    ],
    "/jaxserve.v1.Control/Abort": [control_pb2.AbortRequest(request_id="r")],
    "/jaxserve.v1.Control/GetModelInfo": [control_pb2.GetModelInfoRequest(model="default")],
}
BAD = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS}


def grpc_messages(folder: pathlib.Path) -> Case:
    """Serialized messages with bytes changed, over a real connection."""
    loop = asyncio.new_event_loop()

    async def start() -> tuple[MockEngine, Any]:
        engine, service = _service()
        server = GrpcServer(port=0, limits=LIMITS)
        port = await server.start()
        await server.serve(service)
        return engine, (server, grpc.aio.insecure_channel(f"127.0.0.1:{port}"))

    engine, (server, channel) = loop.run_until_complete(start())

    async def call(path: str, data: bytes) -> tuple[grpc.StatusCode, str]:
        try:
            if path.endswith("Generate"):
                async for _ in channel.unary_stream(path)(data, timeout=CASE_LIMIT_S / 2):
                    pass
            else:
                await channel.unary_unary(path)(data, timeout=CASE_LIMIT_S / 2)
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        return grpc.StatusCode.OK, ""

    def case(rng: random.Random, keep: Any = server) -> Iterable[str]:
        path = rng.choice(list(MESSAGES) + ["/jaxserve.v1.Inference/Generate"] * 3)
        data = rng.choice(MESSAGES[path]).SerializeToString()
        data = mutate_bytes(rng, data, 4) if rng.random() < 0.9 else rng.randbytes(rng.randint(0, 200))
        code, text = loop.run_until_complete(call(path, data))
        assert code not in BAD, f"{path} {code}: {text}"
        assert not engine.live, "a request is still live"
        return [text] if code is not grpc.StatusCode.OK else []

    return case


START = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
PAYLOAD = b'{"prompt": "a", "max_tokens": 2}'
WIRES = [
    START + b"Content-Length: %d\r\n\r\n" % len(PAYLOAD) + PAYLOAD,
    START
    + b"Transfer-Encoding: chunked\r\n\r\n%x;a=b\r\n%b\r\n0\r\nX-A: b\r\nX-C: d\r\n\r\n" % (len(PAYLOAD), PAYLOAD),
    START.replace(b"close", b"Upgrade, HTTP2-Settings")
    + b"Upgrade: h2c\r\nContent-Length: %d\r\n\r\n" % len(PAYLOAD)
    + PAYLOAD,
    START.replace(b"1.1", b"1.0") + b"Content-Length: %d\r\n\r\n" % len(PAYLOAD) + PAYLOAD,
    START
    + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(gzip.compress(PAYLOAD))
    + gzip.compress(PAYLOAD),
    b"HEAD /v1/models/ HTTP/1.1\r\nHost: localhost\r\n\r\nGET /load HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
]


def http_wire(folder: pathlib.Path) -> Case:
    """Bytes of whole HTTP messages (trailers, chunks, offers, codings), over a real connection that the client then ends."""
    loop = asyncio.new_event_loop()

    async def start() -> tuple[MockEngine, Any]:
        engine, service = _service()
        return engine, await serve_http(service, port=0)

    _, server = loop.run_until_complete(start())

    async def talk(raw: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            writer.write(raw)
            writer.write_eof()
            return await asyncio.wait_for(reader.read(), CASE_LIMIT_S / 2)
        except ConnectionError:
            return b""
        finally:
            writer.close()

    def case(rng: random.Random) -> Iterable[str]:
        raw = rng.choice(WIRES)
        if rng.random() < 0.2:
            at = raw.find(b"\r\n") + 2
            raw = (
                raw[:at]
                + rng.choice((b"X-A: b\r\n", b"X-A: " + b"b" * 999 + b"\r\n")) * rng.choice((10, 400))
                + raw[at:]
            )
        raw = mutate_bytes(rng, raw, 3) if rng.random() < 0.9 else raw
        reply = loop.run_until_complete(talk(raw))
        assert not reply or reply.startswith(b"HTTP/1.1 "), reply[:100]
        assert not reply.startswith(b"HTTP/1.1 5") or reply.startswith((b"HTTP/1.1 501", b"HTTP/1.1 505")), reply[:300]
        return [reply.decode("latin-1")] if reply and not reply.startswith(b"HTTP/1.1 2") else []

    return case


TARGETS = {"http": http_bodies, "http_wire": http_wire, "grpc": grpc_messages}
