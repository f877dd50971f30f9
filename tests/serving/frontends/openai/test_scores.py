"""/score and /rerank: shapes of vLLM, Jina and Cohere, over models that read pairs and models that embed."""

from __future__ import annotations

import numpy as np
import pytest

from serving.frontends.openai.protocol.scores import RerankReply, ScoreReply
from tests.mock_engine import EmbeddingEngine, MockEngine, ScoringEngine
from tests.serving.frontends.conftest import Start


async def _post(running, path, **body):
    reply = await running.http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize(
    ("first", "second"), [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]
)
async def test_one_against_several_and_as_many_against_as_many(start: Start, path, first, second):
    running = await start(ScoringEngine())
    reply = await _post(running, path, **{first: "abc", second: ["abx", "xyz"]})
    ScoreReply.model_validate(reply)
    assert [d["index"] for d in reply["data"]] == [0, 1]
    assert np.allclose([d["score"] for d in reply["data"]], [2 / 3, 0])
    assert reply["usage"]["prompt_tokens"] == reply["usage"]["total_tokens"] == 2 * 7
    assert running.engine.scored[0].segment_ids == (0, 0, 0, 0, 1, 1, 1)
    reply = await _post(running, path, **{first: ["abc", "xyz"], second: ["abx", "xyz"]})
    assert np.allclose([d["score"] for d in reply["data"]], [2 / 3, 1])


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
async def test_documents_come_back_best_first(start: Start, path):
    running = await start(ScoringEngine())
    documents = ["xyz", {"text": "abc"}, "abx"]
    reply = await _post(running, path, query="abc", documents=documents, model="default")
    RerankReply.model_validate(reply)
    assert [r["index"] for r in reply["results"]] == [1, 2, 0] and reply["model"] == "mock"
    assert [r["document"]["text"] for r in reply["results"]] == ["abc", "abx", "xyz"]
    assert np.allclose([r["relevance_score"] for r in reply["results"]], [1, 2 / 3, 0])
    reply = await _post(running, path, query="abc", documents=documents, top_n=2, return_documents=False)
    assert [r["index"] for r in reply["results"]] == [1, 2] and "document" not in reply["results"][0]
    assert len((await _post(running, path, query="abc", documents=documents, top_n=0))["results"]) == 3


async def test_a_model_that_embeds_scores_by_cosine_and_reads_each_text_once(start: Start):
    running = await start(EmbeddingEngine())
    reply = await _post(running, "/score", text_1="ab", text_2=["ab", "zz", "ab"])

    def vector(text):
        ids = np.array([256, *text.encode(), 0, 0][:4], np.float64)
        return ids / np.linalg.norm(ids)

    expected = [vector("ab") @ vector(text) for text in ("ab", "zz", "ab")]
    assert np.allclose([d["score"] for d in reply["data"]], expected, atol=1e-6)
    assert len(running.engine.embedded) == 2 and reply["usage"]["prompt_tokens"] == 6


async def test_long_texts_are_refused_or_cut(start: Start):
    running = await start(ScoringEngine())
    long = {"text_1": "a" * 400, "text_2": "b" * 400}
    refused = await running.http.post("/score", json=long)
    assert refused.status_code == 400 and "801 tokens" in refused.json()["error"]["message"]
    await _post(running, "/score", **long, truncate_prompt_tokens=100)
    await _post(running, "/score", **long, truncate_prompt_tokens=-1)
    assert [len(pair.token_ids) for pair in running.engine.scored] == [99, 511]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/score", {}, "text_1"),
        ("/score", {"text_1": "a"}, "text_2"),
        ("/score", {"text_1": [], "text_2": "a"}, "text_1"),
        ("/score", {"text_1": "a", "queries": "a", "text_2": "b"}, "text_1"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/score", {"text_1": "a", "text_2": ["b"] * 1025}, "text_2"),
        ("/score", {"text_1": "a", "text_2": ""}, "text_2"),
        ("/score", {"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("/rerank", {"query": "a"}, "documents"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("/rerank", {"query": "a", "documents": [{"image": "x"}]}, "documents[0]"),
        ("/rerank", {"query": "", "documents": ["a", "b"]}, "query"),
        ("/rerank", {"query": "a", "documents": ["b", ""]}, "documents[1]"),
        ("/score", {"text_1": "a", "text_2": "b", "model": "other"}, "model"),
    ],
)
async def test_wrong_requests_name_their_field(start: Start, path, body, param):
    running = await start(ScoringEngine())
    reply = await running.http.post(path, json=body)
    assert reply.status_code == (404 if "model" in body else 400), reply.text
    assert param is None or reply.json()["error"]["param"] == param
    assert not running.engine.scored


async def test_models_say_what_they_cannot_do(start: Start):
    plain = await start(MockEngine())
    assert (await plain.http.post("/rerank", json={"query": "a", "documents": ["b"]})).status_code == 501
    scorer = await start(ScoringEngine())
    assert (await scorer.chat()).status_code == 501
    assert (await scorer.http.post("/v1/embeddings", json={"input": "a"})).status_code == 501
