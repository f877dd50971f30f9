"""/v1/completions: prompts of every form, echo with logprobs as evaluation harnesses read it, streams."""

from __future__ import annotations

import pytest
from openai.types import Completion
from pydantic import TypeAdapter

from tests.serving.frontends.conftest import Running

PATH = "/v1/completions"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("abc", 1), (["abc", "xy"], 2), ([97, 98], 1), ([[97, 98], [99]], 2)],
)
async def test_prompts_of_every_form(running: Running, prompt, prompts):
    reply = await running.http.post(PATH, json={"prompt": prompt, "max_tokens": 3, "n": 2})
    parsed = TypeAdapter(Completion).validate_python(reply.json())
    assert [c.index for c in parsed.choices] == list(range(2 * prompts))
    assert {c.text for c in parsed.choices} == {"Hel"} and {c.finish_reason for c in parsed.choices} == {"length"}
    assert parsed.usage is not None and parsed.usage.completion_tokens == 6 * prompts
    sent = sum(len(r.prompt_token_ids) for r in running.engine.requests) // 2
    assert parsed.usage.prompt_tokens == sent


async def test_max_tokens_defaults_to_16(running: Running):
    await running.http.post(PATH, json={"prompt": "abc"})
    assert running.engine.requests[0].params.max_tokens == 16


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_echo_with_logprobs_scores_the_prompt(running: Running, max_tokens):
    body = {"prompt": [[97, 98, 99]], "echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0}
    reply = (await running.http.post(PATH, json=body)).json()
    choice = reply["choices"][0]
    lp = choice["logprobs"]
    assert choice["text"] == "abc" + "H" * max_tokens
    assert lp["tokens"] == ["a", "b", "c", "H"][: 3 + max_tokens]
    assert lp["token_logprobs"] == [None, -0.5, -0.5, -0.5][: 3 + max_tokens]
    assert lp["top_logprobs"][0] is None and lp["top_logprobs"][1] == {"b": -0.5}
    assert lp["text_offset"] == [0, 1, 2, 3][: 3 + max_tokens]
    assert reply["usage"]["completion_tokens"] == max_tokens


async def test_a_bos_that_is_not_in_the_text_takes_no_room_in_it(running: Running):
    reply = await running.http.post(PATH, json={"prompt": "abc", "echo": True, "logprobs": 0, "max_tokens": 1})
    lp = reply.json()["choices"][0]["logprobs"]
    assert lp["tokens"] == ["<s>", "a", "b", "c", "H"] and lp["text_offset"] == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [None, 2])
async def test_a_stream_adds_up_to_the_reply(running: Running, echo, logprobs):
    body = {"prompt": ["abc", "xy"], "max_tokens": 4, "n": 2, "echo": echo, "logprobs": logprobs}
    whole = (await running.http.post(PATH, json=body)).json()
    chunks = await running.chunks(PATH, **body, stream_options={"include_usage": True})
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == "length" and all(c["finish_reason"] is None for c in mine[:-1])
        if logprobs is not None:
            for key, values in choice["logprobs"].items():
                assert [v for c in mine for v in c["logprobs"][key]] == values
    for chunk in chunks if logprobs is None else ():  # the types have no null for a prompt's first token
        TypeAdapter(Completion).validate_python(_finished(chunk))


def _finished(chunk: dict) -> dict:
    """openai.types.Completion wants a finish reason in every chunk; its server sends null, as we do."""
    return {**chunk, "choices": [{**c, "finish_reason": c["finish_reason"] or "stop"} for c in chunk["choices"]]}


async def test_the_client_streams(running: Running):
    text = ""
    stream = await running.client.completions.create(model="mock", prompt="abc", max_tokens=50, stream=True)
    async for chunk in stream:
        text += chunk.choices[0].text
    assert text == "Hello wörld!"


WRONG = [
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "best_of": 3}, "best_of"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "max_tokens": -1, "echo": True}, "max_tokens"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": "a" * 600}, "prompt"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": ["a"] * 1025}, "prompt"),
    ({"prompt": ["a"] * 1000, "n": 2}, "n"),
    ({}, "prompt"),
]


async def test_what_cannot_be_served_is_a_400_that_names_the_field(running: Running):
    for fields, param in WRONG:
        reply = await running.http.post(PATH, json=fields)
        assert reply.status_code == 400, (fields, reply.text)
        error = reply.json()["error"]
        assert (error["param"], error["type"]) == (param, "invalid_request_error"), (fields, error)
        assert len(error["message"]) > 10
    assert not running.engine.requests
