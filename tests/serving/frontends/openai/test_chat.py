"""Chat over HTTP with the official client: shapes, streams, usage, logprobs, extras."""

from __future__ import annotations

import asyncio

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter

from tests.mock_engine import MockEngine, until
from tests.serving.frontends.conftest import HI, Running, Start

TEXT = "Hello wörld!"
TOKENS = len(TEXT.encode()) + 1  # and end-of-sequence


async def test_a_reply_has_openais_shape(running: Running):
    reply = await running.chat(model="default", logprobs=True, top_logprobs=2, n=2, temperature=1)
    assert reply.status_code == 200
    parsed = TypeAdapter(ChatCompletion).validate_python(reply.json())
    assert [c.message.content for c in parsed.choices] == [TEXT, TEXT]
    assert [c.finish_reason for c in parsed.choices] == ["stop", "stop"]
    assert parsed.usage and parsed.usage.completion_tokens == 2 * TOKENS
    assert parsed.usage.total_tokens == parsed.usage.prompt_tokens + parsed.usage.completion_tokens
    entries = parsed.choices[0].logprobs.content  # type: ignore[union-attr]
    assert entries is not None and len(entries) == TOKENS and len(entries[0].top_logprobs) == 2
    assert bytes(b for e in entries[:-1] for b in e.bytes or ()).decode() == TEXT
    assert parsed.model == "mock" and parsed.id.startswith("chatcmpl-")


async def test_the_client_reads_a_stream(running: Running):
    stream = await running.client.chat.completions.create(
        model="default", messages=HI, stream=True, n=2, stream_options={"include_usage": True}
    )
    texts, finishes, usage = ["", ""], [None, None], None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
    assert texts == [TEXT, TEXT] and finishes == ["stop", "stop"]
    assert usage is not None and usage.completion_tokens == 2 * TOKENS


async def test_chunks_have_openais_shape_and_order(running: Running):
    chunks = await running.chunks(stream_options={"include_usage": True})
    parsed = [TypeAdapter(ChatCompletionChunk).validate_python(chunk) for chunk in chunks]
    assert parsed[0].choices[0].delta.role == "assistant" and parsed[0].choices[0].delta.content == ""
    assert all(c.choices[0].delta.role is None for c in parsed[1:-1])
    assert parsed[-2].choices[0].finish_reason == "stop"
    assert all(c.choices[0].finish_reason is None for c in parsed[:-2])
    assert parsed[-1].choices == [] and parsed[-1].usage is not None
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({(c.id, c.created, c.model, c.object) for c in parsed}) == 1


async def test_without_include_usage_no_chunk_has_usage(running: Running):
    chunks = await running.chunks()
    assert all("usage" not in chunk for chunk in chunks)
    assert all(chunk["choices"] for chunk in chunks)


async def test_continuous_usage_grows(running: Running):
    chunks = await running.chunks(stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == TOKENS and counts[1] == 1
    assert all(chunk["usage"]["prompt_tokens"] > 0 for chunk in chunks)


async def test_half_characters_are_not_sent(running: Running):
    chunks = await running.chunks()
    pieces = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert "ö" in pieces and "".join(p or "" for p in pieces) == TEXT


async def test_streamed_logprobs_and_ids_cover_every_token(running: Running):
    chunks = await running.chunks(logprobs=True, return_token_ids=True, return_tokens_as_token_ids=True)
    ids = [i for chunk in chunks for i in chunk["choices"][0].get("token_ids") or ()]
    named = [e["token"] for c in chunks if c["choices"][0]["logprobs"] for e in c["choices"][0]["logprobs"]["content"]]
    assert len(ids) == TOKENS and named == [f"token_id:{i}" for i in ids]
    assert chunks[0]["prompt_token_ids"]


async def test_quotes_newlines_and_controls_survive_the_fast_path(start: Start):
    text = 'a "quoted" \\ line\n\ttab \u0001 \u2028 é 😀'
    running = await start(MockEngine(reply=text))
    chunks = await running.chunks()
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == text


async def test_vllms_extras_reach_the_engine(running: Running):
    await running.client.chat.completions.create(
        model="mock",
        messages=HI,
        seed=7,
        stop=["zz"],
        max_completion_tokens=5,
        extra_body={
            "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5, "min_tokens": 2, "stop_token_ids": [9],
            "ignore_eos": True, "allowed_token_ids": [1, 2], "bad_words": ["no"], "priority": -4, "cache_salt": "pepper",
            "skip_special_tokens": False, "unknown_field": {"is": "ignored"}, "timeout": 20,
        },
    )  # fmt: skip
    (request,) = running.engine.requests
    p = request.params
    assert (p.top_k, p.min_p, p.repetition_penalty, p.min_tokens, p.max_tokens, p.seed) == (3, 0.1, 1.5, 2, 5, 7)
    assert p.stop_token_ids == (9,) and p.ignore_eos and p.allowed_token_ids == (1, 2) and not p.skip_special_tokens
    assert request.priority == -4 and request.cache_salt == "pepper" and request.deadline is not None


async def test_request_id_names_the_reply(running: Running):
    reply = await running.chat(request_id="mine-1")
    assert reply.json()["id"] == "chatcmpl-mine-1"
    assert running.engine.requests[0].request_id.startswith("mine-1#")


async def test_stop_string_is_told(start: Start):
    running = await start(MockEngine(reply="one two three"))
    choice = (await running.chat(stop=[" three"])).json()["choices"][0]
    assert choice["message"]["content"] == "one two" and choice["stop_reason"] == " three"
    chunks = await running.chunks(stop=[" three"])
    assert chunks[-1]["choices"][0]["stop_reason"] == " three"


async def test_length_and_prompt_logprobs(running: Running):
    reply = (await running.chat(max_tokens=3, prompt_logprobs=1)).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["prompt_logprobs"][0] is None
    assert all(len(position) == 1 for position in reply["prompt_logprobs"][1:])
    assert len(reply["prompt_logprobs"]) == reply["usage"]["prompt_tokens"]


async def test_template_kwargs_are_scalars(running: Running):
    assert (await running.chat(chat_template_kwargs={"enable_thinking": False})).status_code == 200
    reply = await running.chat(chat_template_kwargs={"enable_thinking": False, "evil": {"nested": 1}})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "chat_template_kwargs"


async def test_a_client_that_goes_aborts_its_stream(start: Start):
    running = await start(MockEngine(reply="x" * 400, step_s=0.005))
    stream = await running.client.chat.completions.create(model="default", messages=HI, stream=True)
    seen = 0
    async for _ in stream:
        seen += 1
        if seen == 3:
            break
    await stream.close()
    await until(lambda: running.engine.aborted and not running.engine.live and running.service.num_live == 0)


async def test_a_client_that_goes_aborts_an_unstreamed_request(start: Start):
    running = await start(MockEngine(reply="x" * 400, step_s=0.005))
    with pytest.raises(openai.APITimeoutError):
        await running.client.with_options(timeout=0.1).chat.completions.create(model="default", messages=HI, n=3)
    await until(lambda: len(running.engine.aborted) == 3 and not running.engine.live)


async def test_a_client_that_goes_before_the_first_token_aborts(start: Start):
    running = await start(MockEngine(reply="x", step_s=30.0))
    task = asyncio.ensure_future(running.chat(stream=True))
    await until(lambda: running.engine.live)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: not running.engine.live)
