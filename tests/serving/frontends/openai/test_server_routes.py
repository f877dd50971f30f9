"""Routes about the server, tokens and embeddings, and the API document."""

from __future__ import annotations

import base64

import numpy as np
import openai
import pytest

from tests.mock_engine import EmbeddingEngine
from tests.serving.frontends.conftest import Running, Start


async def test_models(running: Running):
    names = [model.id async for model in running.client.models.list()]
    assert names == ["mock"]  # aliases answer, but are not listed
    assert (await running.client.models.retrieve("default")).id == "mock"


async def test_health_ready_version(running: Running):
    assert (await running.http.get("/health")).json() == {"status": "ok"}
    assert (await running.http.get("/ready")).json() == {"status": "ready"}
    assert (await running.http.get("/version")).json() == {"version": "0.0.0"}


async def test_load_generators_may_look_at_the_metrics_by_head(running: Running):
    reply = await running.http.head("/metrics")
    assert reply.status_code == 200 and reply.content == b""


async def test_tokens_there_and_back(running: Running):
    reply = (await running.http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True})).json()
    assert reply["tokens"] == [256, *"hé".encode()] and reply["count"] == 4 and reply["max_model_len"] == 512
    assert reply["token_strs"][1] == "h"
    back = (await running.http.post("/detokenize", json={"tokens": reply["tokens"][1:]})).json()
    assert back == {"prompt": "hé"}
    chat = (await running.http.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]})).json()
    await running.chat(messages=[{"role": "user", "content": "x"}])
    assert tuple(chat["tokens"]) == running.engine.requests[0].prompt_token_ids
    info = (await running.http.get("/tokenizer_info")).json()
    assert info["eos_token"] == "</s>" and info["bos_token"] == "<s>"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": []}),
        ("/detokenize", {"tokens": [999]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {}),
    ],
)
async def test_wrong_token_requests(running: Running, path, body):
    assert (await running.http.post(path, json=body)).status_code == 400


async def test_embeddings_of_text_and_ids_in_both_encodings(start: Start):
    running = await start(EmbeddingEngine())
    reply = await running.client.embeddings.create(model="default", input=["ab", "c"])  # the client asks for base64
    assert [d.index for d in reply.data] == [0, 1] and len(reply.data[0].embedding) == 4
    plain = await running.client.embeddings.create(model="default", input=["ab", "c"], encoding_format="float")
    assert np.allclose(plain.data[0].embedding, reply.data[0].embedding)
    raw = await running.http.post("/v1/embeddings", json={"input": [1, 2], "encoding_format": "base64"})
    vector = np.frombuffer(base64.b64decode(raw.json()["data"][0]["embedding"]), "<f4")
    assert np.allclose(vector, np.array([1, 2, 0, 0]) / np.sqrt(5))
    short = await running.client.embeddings.create(model="default", input=[3, 4, 9], dimensions=2)
    assert np.allclose(short.data[0].embedding, [0.6, 0.8]) and short.usage.prompt_tokens == 3
    for wrong in ({"dimensions": 5}, {"input": []}, {"input": ""}, {"input": [10**6]}, {"input": "x" * 600}):
        with pytest.raises(openai.BadRequestError):
            await running.client.embeddings.create(**{"model": "mock", "input": "a", **wrong})


async def test_a_refusal_of_one_input_is_the_requests(start: Start):
    running = await start(EmbeddingEngine())
    running.engine.fail_next = "full"
    with pytest.raises(openai.RateLimitError, match="full"):
        await running.client.embeddings.create(model="default", input=["ab", "c"])


async def test_an_engine_that_cannot_embed_says_so(running: Running):
    reply = await running.http.post("/v1/embeddings", json={"input": "a"})
    assert reply.status_code == 501 and "does not give embeddings" in reply.json()["error"]["message"]


async def test_the_api_document_tells_no_422(running: Running):
    document = (await running.http.get("/openapi.json")).json()
    assert "/v1/chat/completions" in document["paths"]
    for path in document["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]
