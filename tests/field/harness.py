"""How lines of http.jsonl are asked, and where what is right about them is kept."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Awaitable, Callable
from typing import Any

from serving.frontends.app import create_app
from serving.frontends.http.direct import post
from serving.service import TextService
from serving.text.chat_template import ChatTemplate
from serving.text.grammar import GrammarCompiler
from tests.mock_engine import EmbeddingEngine, MockEngine, ScoringEngine, mock_service
from tests.serving.frontends.openai.test_structured import RandomEngine
from tests.serving.text.vocabularies import byte_level

Line = dict[str, Any]
LINES: list[Line] = [
    json.loads(text) for text in (pathlib.Path(__file__).parent / "http.jsonl").read_text().splitlines()
]
CHECKS: dict[str, Callable[[Line], Awaitable[None]]] = {}
WEATHER = '{"name": "get_weather", "arguments": {\n"city": "Paris"\n}}'
THINKING = {"reasoning_parser": "think", "tool_parser": "hermes"}


def right(*ids: str) -> Callable[[Any], Any]:
    """Registers what is right about these lines."""

    def note(function: Any) -> Any:
        CHECKS.update(dict.fromkeys(ids, function))
        return function

    return note


def line_of(name: str) -> Line:
    return next(line for line in LINES if line["id"] == name)


async def ask(service: TextService, line: Line, **changes: Any) -> tuple[int, dict[str, Any]]:
    """The line's request, straight into the application."""
    path = line["route"].split()[1]
    body = json.dumps({**line["body"], **changes}).encode()
    app = create_app(service, page=False)
    status, reply = await post(app, path, body, ((b"content-type", b"application/json"),))
    return status, json.loads(reply)


async def streamed(service: TextService, line: Line, **changes: Any) -> list[dict[str, Any]]:
    path = line["route"].split()[1]
    body = json.dumps({**line["body"], **changes}).encode()
    status, reply = await post(create_app(service, page=False), path, body, ((b"content-type", b"application/json"),))
    assert status == 200, reply
    return [json.loads(text[6:]) for text in reply.decode().split("\n\n") if text.startswith("data: {")]


def any_model(**options: Any) -> TextService:
    """A model that writes any allowed token, held by real grammars."""
    engine = RandomEngine()
    tokenizer = byte_level()
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    return mock_service(engine, tokenizer=tokenizer, grammar_compiler=compiler, **options)


def templated(source: str, reply: str = "ok", **options: Any) -> tuple[MockEngine, TextService]:
    """A model with a chat template of its own."""
    engine = MockEngine(reply=lambda request: byte_level().encode(reply, add_special_tokens=False))
    tokenizer = byte_level()
    engine._info = engine._info.__class__(**{**engine._info.__dict__, "vocab_size": tokenizer.vocab_size})
    return engine, TextService(engine, tokenizer, ChatTemplate(source, tokenizer), model_id="mock", **options)


def fixed(reply: str, **options: Any) -> TextService:
    return mock_service(MockEngine(reply=reply), **{**THINKING, **options})


def service_for(line: Line) -> TextService:
    """Where a line is sent that only has `expect`."""
    if line["kind"] in ("structured", "tools") or line["id"] == "format-internals":
        return any_model()
    if "embeddings" in line["route"]:
        return mock_service(EmbeddingEngine())
    return mock_service(ScoringEngine() if "rerank" in line["route"] else MockEngine(reply="Hello"))
