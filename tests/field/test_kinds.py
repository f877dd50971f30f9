"""More requests of the kinds that http.jsonl samples: what is the client's is a 400 that names its field in the client's words."""

from __future__ import annotations

import json

import pytest

from serving.frontends.app import create_app
from serving.frontends.http.direct import post
from tests.field.harness import any_model
from tests.mock_engine import EmbeddingEngine, ScoringEngine, mock_service

USER = [{"role": "user", "content": "hi"}]
CHAT = [
    ({"seed": 2**63}, "seed", "must be between"),
    ({"n": 10**11}, "n", "between 1 and"),
    ({"top_p": 0}, "top_p", "more than 0"),
    ({"stop": [""]}, "stop", "non-empty"),
    ({"logit_bias": {"5_0": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {" 5": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"\u0665": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"9" * 30: 1}}, "logit_bias", "ids go from 0"),
    ({"logit_bias": {"9" * 90: 1}}, "logit_bias", "token ids"),
    ({"min_tokens": 5, "max_tokens": 2}, "min_tokens", "more than max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens", "between 1 and"),
    ({"truncate_prompt_tokens": 10**30}, "truncate_prompt_tokens", "maximum context length"),
    ({"stop_token_ids": [10**20]}, "stop_token_ids", "ids go from 0"),
    ({"priority": 10**30}, "priority", "32 bits"),
    ({"messages": []}, "messages", "is empty"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "got a whole number"),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages[0].content", "got an object"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "surrogate"),
    ({"messages": [{"role": "user", "content": [["a"]]}]}, "messages[0].content[0]", "type"),
    ({"chat_template_kwargs": {"x": {"y": 1}}}, "chat_template_kwargs", "x is an object"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "letters, digits"),
    ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needs json_schema.schema"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed group"),
    ({"structured_outputs": {"regex": "\ud800"}}, "structured_outputs", "half of a character"),
    ({"structured_outputs": {"choice": ["a\udfff"]}}, "structured_outputs", "half of a character"),
    ({"structured_outputs": {"grammar": "start: start"}}, "structured_outputs", "no text at all"),
    ({"structured_outputs": {"json": '{"maxLength": ' + "9" * 5000 + "}"}}, "structured_outputs", "too many digits"),
    ({"structured_outputs": {"json": '{"not": 5}'}}, "structured_outputs", "uses not"),
    ({"structured_outputs": {"json": '{"type": "string", "minLength": 1e400}'}}, "structured_outputs", "minLength"),
]
OTHERS = [
    ("/v1/completions", {"prompt": [10**20]}, "prompt", "ids go from 0"),
    ("/v1/completions", {"prompt": [[], [1]]}, "prompt", "is empty"),
    ("/v1/completions", {"prompt": "a", "best_of": 3, "n": 5}, "best_of", "equal to n"),
    ("/v1/responses", {"input": [{"type": "function_call"}]}, "input[0]", "needs name"),
    ("/v1/responses", {"input": "a", "max_output_tokens": 10**30}, "max_output_tokens", "between 1 and"),
    ("/detokenize", {"tokens": [10**30]}, "tokens", "ids go from 0"),
    ("/v1/embeddings", {"input": [[1, "a"]]}, "input[0][1]", "a whole number, got text"),
    ("/v1/embeddings", {"input": "a", "dimensions": 10**9}, "dimensions", "for this model"),
    ("/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n", "at least 0"),
    ("/score", {"text_1": "a", "text_2": []}, "text_2", "is empty"),
]  # fmt: skip
PYTHONS = ("int ", "dict", "NoneType", "codec", "set_int_max_str_digits", "Traceback", "inf:", "nan")


@pytest.fixture(scope="module")
def apps():
    text = create_app(any_model(), page=False)
    vectors = create_app(mock_service(EmbeddingEngine()), page=False)
    pairs = create_app(mock_service(ScoringEngine()), page=False)
    return {"/v1/embeddings": vectors, "/rerank": pairs, "/score": pairs, "": text}


async def refused(apps, path, raw, param, words):
    app = apps.get(path, apps[""])
    status, reply = await post(app, path, raw, ((b"content-type", b"application/json"),))
    error = json.loads(reply)["error"]
    assert (status, error["param"]) == (400, param) and words in error["message"], error
    assert not [word for word in PYTHONS if word in error["message"]], error


@pytest.mark.parametrize(("change", "param", "words"), CHAT)
async def test_chat(apps, change, param, words):
    body = {"messages": USER, "max_tokens": 2, **change}
    await refused(apps, "/v1/chat/completions", json.dumps(body).encode(), param, words)


@pytest.mark.parametrize(("path", "body", "param", "words"), OTHERS)
async def test_other_routes(apps, path, body, param, words):
    await refused(apps, path, json.dumps(body).encode(), param, words)


async def test_a_number_of_too_many_digits_is_told_without_pythons_words(apps):
    raw = b'{"messages": [], "max_tokens": ' + b"9" * 5000 + b"}"
    await refused(apps, "/v1/chat/completions", raw, None, "a number has too many digits")
