"""The lines that depend on generation, on a real engine: its scheduler, pages, masks, sampling.

The model is tiny and its weights are random. Where a line is about what a model wrote, a grammar of one word makes it write that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import AsyncIterator
from typing import Any

import pytest

from models.config import ModelConfig, RopeConfig
from models.dummy import random_model
from serving.engine.api.client import EngineClient
from serving.engine.api.sampling_params import StructuredOutputs
from serving.engine.api.types import EngineInfo, EngineOutput, EngineRequest, EngineStats
from serving.service import TextService
from serving.text.grammar import GrammarCompiler
from tests.field import chat_right, harness, http_right
from tests.field.harness import CHECKS, LINES, THINKING, ask, line_of, streamed
from tests.field.test_http import check_expected
from tests.field.text_right import offsets_fit
from tests.mock_engine import MockTemplate, until
from tests.serving.text.vocabularies import byte_level
from tests.tiny import tiny_engine

CONTEXT = 512
FORCED = (
    "stop-cuts-call", "stop-in-thinking", "reasoning-usage", "continue-thinking", "tool-and-schema", "open-objects",
    "ignored-json-object-schema", "ignored-guided",
)  # fmt: skip
EXPECTED = tuple(
    line["id"]
    for line in LINES
    if line["id"] not in CHECKS
    and line["kind"] in ("structured", "errors", "limits")
    and line["route"].endswith(("completions", "responses"))
)


@pytest.fixture(scope="module")
def engine():
    tokenizer = byte_level()
    rope = RopeConfig(10000.0, 16)
    config = ModelConfig(
        "LlamaForCausalLM", tokenizer.vocab_size, 2, 32, 48, 2, 1, 16, CONTEXT, 1e-5, tie_embeddings=True, rope=rope
    )
    engine = tiny_engine(model=random_model(config), max_num_seqs=4, max_model_len=CONTEXT, num_pages=200)
    yield engine
    engine.shutdown()


class Forced(EngineClient):
    """The engine, whose model writes what it is told."""

    def __init__(self, client: EngineClient, reply: str) -> None:
        self._client = client
        self._constraint = compiler().compile(StructuredOutputs(choice=(reply,)))

    def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        assert request.constraint is None
        return self._client.generate(dataclasses.replace(request, constraint=self._constraint()))

    async def abort(self, request_id: str) -> bool:
        return await self._client.abort(request_id)

    def info(self) -> EngineInfo:
        return self._client.info()

    def stats(self) -> EngineStats:
        return self._client.stats()

    @property
    def healthy(self) -> bool:
        return self._client.healthy


@functools.cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(byte_level(), byte_level().vocab_size)


def service(client: EngineClient, **options: Any) -> TextService:
    template: Any = MockTemplate()
    return TextService(client, byte_level(), template, model_id="mock", **options)


def real_model(engine: Any, **options: Any) -> TextService:
    """As `harness.any_model`."""
    return service(engine.client, grammar_compiler=compiler(), default_params={"temperature": 0.8}, **options)


@pytest.fixture
def on_the_engine(engine, monkeypatch):
    """The checks' own makers of services make them over the engine."""
    for module in (chat_right, http_right, harness):
        monkeypatch.setattr(module, "any_model", functools.partial(real_model, engine))
    fixed = lambda reply, **options: service(Forced(engine.client, reply), **{**THINKING, **options})  # noqa: E731
    monkeypatch.setattr(chat_right, "fixed", fixed)


async def idle(engine: Any) -> None:
    await until(lambda: not engine.client.num_live, "nothing is left behind")
    stats = engine.client.stats()
    await until(lambda: engine.client.stats().num_running == 0, "every slot is free")
    assert engine.failure is None and stats.num_failed_steps == 0 and stats.num_recompilations == 0


@pytest.mark.parametrize("name", FORCED)
async def test_what_is_right_about_a_line(name: str, engine, on_the_engine):
    await CHECKS[name](line_of(name))
    await idle(engine)


@pytest.mark.parametrize("name", EXPECTED)
async def test_a_line_has_its_status(name: str, engine):
    line = line_of(name)
    check_expected(line, *await ask(real_model(engine), line))
    await idle(engine)


async def test_offsets_and_logprobs(engine):
    """Of a prompt and its greedy completion, whole and in a stream."""
    for name in ("offsets", "offsets-control"):
        line = line_of(name)
        options = {"temperature": 0, "max_tokens": 12, "logprobs": 2}
        status, body = await ask(real_model(engine), line, **options)
        (choice,) = body["choices"]
        assert status == 200 and body["usage"]["completion_tokens"] <= 12
        offsets_fit(choice)
        chunks = [chunk["choices"][0] for chunk in await streamed(real_model(engine), line, stream=True, **options)]
        assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
        told = [at for chunk in chunks if chunk["logprobs"] for at in chunk["logprobs"]["text_offset"]]
        assert told == choice["logprobs"]["text_offset"]
    await idle(engine)


async def test_stop_strings_cut_what_a_model_writes(engine):
    """A greedy completion, again with each of its parts as a stop string."""
    line = {"route": "POST /v1/completions", "body": {"prompt": "The quick", "temperature": 0, "max_tokens": 30}}
    text = (await ask(real_model(engine), line))[1]["choices"][0]["text"]
    assert len(text) > 10
    for at in range(0, len(text) - 4, 5):
        stop = text[at : at + 4]
        for reply in ((await ask(real_model(engine), line, stop=[stop]))[1],):
            assert reply["choices"][0]["text"] == text[: text.index(stop)]
            assert reply["choices"][0]["finish_reason"] == "stop" and reply["choices"][0]["stop_reason"] == stop
        chunks = await streamed(real_model(engine), line, stop=[stop], stream=True)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text[: text.index(stop)]
    await idle(engine)


async def test_usage_counts_the_tokens_of_a_stream(engine):
    chunks = await streamed(real_model(engine), line_of("usage-role-chunk"), max_tokens=9, ignore_eos=True)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert (
        "role" in chunks[0]["choices"][0]["delta"] and counts[0] == 0 and counts == sorted(counts) and counts[-1] == 9
    )
    await idle(engine)


def test_the_lines_are_there():
    assert set(FORCED) <= set(CHECKS) and len(EXPECTED) > 12
