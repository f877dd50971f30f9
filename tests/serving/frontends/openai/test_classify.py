"""/classify, in vLLM's shape, over a classifier."""

from __future__ import annotations

import pytest

from serving.frontends.openai.protocol.classify import ClassifyReply
from tests.mock_engine import ClassifyingEngine, EmbeddingEngine
from tests.serving.frontends.conftest import Start


async def test_texts_and_token_ids(start: Start):
    running = await start(ClassifyingEngine())
    for given, wanted, read in (
        ("bb", [[1.0, 0.0]], 3),
        (["aaa", "bb"], [[0.25, 0.75], [1.0, 0.0]], 7),
        ([1, 2], [[0.5, 0.5]], 2),
        ([[1, 3, 5, 2], [2]], [[0.25, 0.75], [1.0, 0.0]], 5),
    ):
        reply = (await running.http.post("/classify", json={"model": "mock", "input": given})).json()
        ClassifyReply.model_validate(reply)
        assert [one["probs"] for one in reply["data"]] == wanted, given
        assert [one["index"] for one in reply["data"]] == list(range(len(wanted)))
        assert reply["usage"]["total_tokens"] == read and reply["id"].startswith("classify-")
        for one, probs in zip(reply["data"], wanted, strict=True):
            assert one["label"] == ("odd" if probs[1] > probs[0] else "even") and one["num_classes"] == 2
    chat = {"messages": [{"role": "user", "content": "a"}]}
    assert (await running.http.post("/classify", json=chat)).status_code == 200


async def test_what_the_model_says_before_it_is_made_probabilities(start: Start):
    running = await start(ClassifyingEngine())
    for name in ("use_activation", "activation"):
        reply = (await running.http.post("/classify", json={"input": [1, 3, 4], name: False})).json()
        assert reply["data"][0]["probs"] == [1.0, 2.0], name
        reply = (await running.http.post("/classify", json={"input": [1, 3, 4, 5], name: True})).json()
        assert reply["data"][0]["probs"] == [0.25, 0.75], name


async def test_long_texts_are_refused_or_cut_at_their_end(start: Start):
    running = await start(ClassifyingEngine())
    reply = await running.http.post("/classify", json={"input": "a" * 600})
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "context_length_exceeded"
    assert (
        await running.http.post("/classify", json={"input": "abcd", "truncate_prompt_tokens": 3})
    ).status_code == 200
    assert running.engine.classified == [(256, *b"ab")]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": "a", "messages": []}, "input"),
        ({"input": ["a"] * 1025}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": "a", "priority": 1.5}, "priority"),
        ({"input": "a", "padding": True}, "padding"),
        ({"input": "a", "model": "other"}, "model"),
    ],
)
async def test_wrong_requests_name_their_field(start: Start, body, param):
    running = await start(ClassifyingEngine())
    reply = await running.http.post("/classify", json=body)
    assert reply.status_code == (404 if "model" in body else 400), reply.text
    assert reply.json()["error"]["param"] == param and not running.engine.classified


async def test_another_model_says_that_it_is_none(start: Start):
    reply = await (await start(EmbeddingEngine())).http.post("/classify", json={"input": "a"})
    assert reply.status_code == 501 and "classifier" in reply.json()["error"]["message"]
