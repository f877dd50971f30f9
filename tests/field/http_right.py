"""What is right about HTTP, errors and limits."""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest

from serving.access.keys import KeyRing
from serving.boot.flags import launch as flags
from serving.frontends.app import create_app, serve_http
from serving.frontends.http.direct import post
from serving.service import TextService
from tests.field.chat_right import ITEMS
from tests.field.harness import Line, any_model, ask, line_of, right, templated
from tests.mock_engine import EmbeddingEngine, MockEngine, ScoringEngine, mock_service

# -- HTTP ---------------------------------------------------------------------------------------------------------------


async def talk(line: Line, raw: bytes, service: TextService | None = None) -> tuple[bytes, bytes]:
    """Sends bytes over a socket; returns head and body of what comes back until the connection ends."""
    server = await serve_http(service or mock_service(MockEngine(reply="Hello")), port=0)
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(raw)
        head, _, body = (await asyncio.wait_for(reader.read(), 60)).partition(b"\r\n\r\n")
        writer.close()
    finally:
        await server.stop(grace_s=1.0)
    return head.lower(), body


def raw_post(line: Line, body: bytes, version: str = "1.1", **more: str) -> bytes:
    path = line["route"].split()[1]
    headers = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(body)), **more}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {path} HTTP/{version}\r\n{lines}\r\n".encode() + body


@right("h2c-upgrade")
async def _upgrade(line: Line) -> None:
    body = json.dumps(line["body"]).encode()
    last = raw_post(line, body, Connection="close")
    for raw in (
        raw_post(line, body, **line["headers"]) + last,
        raw_post(line, body, Upgrade="websocket", Connection="upgrade") + last,
    ):
        head, rest = await talk(line, raw)
        assert b" 200 " in head.splitlines()[0] and b"upgrade:" not in head
        assert rest.count(b"chat.completion") == 2, "the offer's own message, and the one behind it"
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    raw = raw_post(line, chunks, **line["headers"]).replace(
        b"Content-Length: %d" % len(chunks), b"Transfer-Encoding: chunked"
    )
    head, rest = await talk(line, raw + last)
    assert b" 200 " in head.splitlines()[0] and rest.count(b"chat.completion") == 2


@right("head")
async def _head(line: Line) -> None:
    for path in (
        "/health",
        "/ready",
        "/v1/models",
        "/v1/models/default",
        "/version",
        "/tokenizer_info",
        "/metrics",
        "/",
    ):
        got, body = await talk(line, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        head, nothing = await talk(
            line, f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        assert b" 200 " in got.splitlines()[0] and body and not nothing
        if path != "/metrics":
            names = [
                row
                for row in got.splitlines()
                if not row.startswith((b"date:", b"x-request-id:", b"transfer-encoding:"))
            ]
            assert all(row in head.splitlines() for row in names), (path, head, got)


@right("http10-stream")
async def _http10(line: Line) -> None:
    raw = raw_post(line, json.dumps(line["body"]).encode(), "1.0", Connection="keep-alive")
    head, body = await talk(line, raw)
    assert b" 200 " in head.splitlines()[0] and b"transfer-encoding" not in head and b"content-length" not in head
    assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")


@right("gzip-body")
async def _gzip(line: Line) -> None:
    plain = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}).encode()
    head, body = await talk(
        line, raw_post(line, gzip.compress(plain), Connection="close", **{"Content-Encoding": "gzip"})
    )
    assert b" 200 " in head.splitlines()[0] and b"chat.completion" in body
    bomb = gzip.compress(b" " * 40 * 2**20)
    head, _ = await talk(line, raw_post(line, bomb, Connection="close", **{"Content-Encoding": "gzip"}))
    assert b" 413 " in head.splitlines()[0]
    head, body = await talk(line, raw_post(line, plain, Connection="close", **{"Content-Encoding": "br"}))
    assert b" 415 " in head.splitlines()[0] and b"'br'" in body
    head, _ = await talk(line, raw_post(line, plain, Connection="close", **{"Content-Encoding": "gzip"}))
    assert b" 400 " in head.splitlines()[0]


@right("models-slash")
async def _slash(line: Line) -> None:
    for path in ("/v1/models/", "/models", "/models/"):
        head, body = await talk(line, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert b" 200 " in head.splitlines()[0] and json.loads(body)["object"] == "list", path


@right("served-names")
async def _served_names(line: Line) -> None:
    service = mock_service(MockEngine(reply="x"), model_id="alpha", aliases=("beta",))
    _, body = await talk(line, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", service)
    assert [card["id"] for card in json.loads(body)["data"]] == ["alpha"]
    for name in ("alpha", "beta", "default", None):
        status, reply = await ask(service, line_of("top-logprobs-zero"), model=name)
        assert (status, reply["model"]) == (200, "alpha")


# -- errors -------------------------------------------------------------------------------------------------------------


@right("overflow")
async def _overflow(line: Line) -> None:
    service = mock_service(MockEngine())
    for changes in (
        {},
        {"messages": [{"role": "user", "content": "x" * 10**6}]},
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 600},
    ):
        status, reply = await ask(service, line, **changes)
        error = reply["error"]
        assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
        assert error["message"].startswith("This model's maximum context length is 512 tokens")
    others = (
        ("/v1/completions", {"prompt": "x" * 600}, "prompt"),
        ("/v1/responses", {"input": "x" * 600}, "input"),
        ("/v1/embeddings", {"input": "x" * 600}, "input"),
    )
    for path, body, param in others:
        status, reply = await ask(mock_service(EmbeddingEngine()), {"route": f"POST {path}", "body": body})
        error = reply["error"]
        assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", param), path
        assert error["message"].startswith("This model's maximum context length is 512 tokens")


# -- limits -------------------------------------------------------------------------------------------------------------


@right("truncate-minus-one")
async def _truncate(line: Line) -> None:
    engine = EmbeddingEngine(max_model_len=100)
    status, body = await ask(mock_service(engine), line)
    assert status == 200 and len(engine.embedded[-1]) == 100
    status, body = await ask(mock_service(engine), line, truncate_prompt_tokens=None)
    assert status == 400 and "100 tokens" in body["error"]["message"]
    status, body = await ask(mock_service(engine), line, truncate_prompt_tokens=101)
    assert (status, body["error"]["param"]) == (400, "truncate_prompt_tokens") and "100 tokens" in body["error"][
        "message"
    ]


@right("tokenize-variants")
async def _tokenize(line: Line) -> None:
    service = mock_service()
    status, body = await ask(service, line)
    assert status == 200 and body["tokens"][-1] == ord("b"), "the last turn is left open"
    user = [{"role": "user", "content": "a"}]
    whole = (await ask(service, {**line, "body": {"messages": user}}))[1]["tokens"]
    assert (await ask(service, {**line, "body": {"messages": user, "add_generation_prompt": None}}))[1][
        "tokens"
    ] == whole
    status, body = await ask(service, {**line, "body": {"prompt": "", "add_special_tokens": False}})
    assert (status, body["tokens"], body["count"]) == (200, [], 0)


@right("responses-conversation")
async def _conversation(line: Line) -> None:
    for name, value in (
        ("conversation", "conv_1"),
        ("conversation", {"id": "c"}),
        ("previous_response_id", "r"),
        ("background", True),
    ):
        status, body = await ask(mock_service(), {**line, "body": {"input": "a", name: value}})
        assert (status, body["error"]["param"]) == (400, name)


@right("ignored-json-object-schema")
async def _json_object_schema(line: Line) -> None:
    for _ in range(3):
        status, body = await ask(any_model(), line, max_tokens=300)
        choice = body["choices"][0]
        assert status == 200 and (
            choice["finish_reason"] == "length" or isinstance(json.loads(choice["message"]["content"])["a"], int)
        )


@right("ignored-guided")
async def _guided(line: Line) -> None:
    status, body = await ask(any_model(), line)
    assert status == 200 and body["choices"][0]["message"]["content"] in ("a", "b")


@right("ignored-beam")
async def _ignored(line: Line) -> None:
    refused = {
        "/v1/completions": {
            "use_beam_search": True, "length_penalty": 2.0, "logprob_token_ids": [1], "prompt_embeds": "x", "suffix": "b",
        },
        "/v1/chat/completions": {
            "use_beam_search": True, "chat_template": "{{ 1 }}", "functions": [{"name": "f"}], "function_call": {"name": "f"},
            "echo": True, "modalities": ["text", "audio"], "regex": "a", "documents": [{"text": "a"}],
        },
        "/v1/embeddings": {"normalize": False, "embed_dtype": "float16", "padding": True, "late_chunking": True},
        "/v1/responses": {"prompt": {"id": "p"}, "use_beam_search": True},
        "/rerank": {"rank_fields": ["a"], "max_tokens_per_doc": 5},
    }  # fmt: skip
    base = {
        "/v1/completions": {"prompt": "a"}, "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
        "/v1/embeddings": {"input": "a"}, "/v1/responses": {"input": "a"}, "/rerank": {"query": "a", "documents": ["b"]},
    }  # fmt: skip
    plain = {
        "use_beam_search": False,
        "length_penalty": 1.0,
        "normalize": True,
        "padding": False,
        "chat_template": None,
        "echo": False,
    }
    for path, fields in refused.items():
        service = mock_service(ScoringEngine() if path == "/rerank" else EmbeddingEngine(reply="x"))
        if path == "/v1/chat/completions":
            _, service = templated(ITEMS)
        for name, value in fields.items():
            status, body = await ask(service, {"route": f"POST {path}", "body": {**base[path], name: value}})
            assert (status, body["error"]["param"]) == (400, name), (path, name, body)
        status, body = await ask(service, {"route": f"POST {path}", "body": {**base[path], **plain}})
        assert status == 200, (path, body)


@right("short-keys")
async def _short_keys(line: Line) -> None:
    ring = KeyRing.of(users=["token-abc123"])
    assert ring.find("token-abc123") is not None and ring.weak == ("key-1",)
    assert not KeyRing.of(users=["x" * 32]).weak


@right("vllm-flags")
async def _vllm_flags(line: Line) -> None:
    words = line["route"].removeprefix("flags ").split()
    taken = [word for word in words if word not in ("--trust-remote-code",)]
    args, _ = flags.parse(taken)
    assert (args.root_path, args.max_logprobs, args.enable_force_include_usage) == ("/llm", 5, True)
    with pytest.raises(SystemExit):
        flags.parse(["--trust-remote-code"])
    service = mock_service(MockEngine(reply="Hello"))
    app = create_app(service, page=False, root_path="/llm", force_usage=True)
    body = json.dumps({"prompt": "a", "max_tokens": 2, "stream": True}).encode()
    for path in ("/v1/completions", "/llm/v1/completions"):
        status, reply = await post(app, path, body, ((b"content-type", b"application/json"),))
        assert status == 200 and b'"completion_tokens":2' in reply, (path, reply)
