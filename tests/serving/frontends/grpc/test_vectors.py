"""Embed and Score over gRPC, and the gateway's way to both."""

import dataclasses

import grpc
import numpy as np
import pytest

from proto.jaxserve.v1 import inference_pb2 as pb
from serving.errors import ErrorKind, RequestError
from serving.frontends.grpc.client import RemoteEngineClient
from serving.gateway import Pool
from serving.service import GenerateInput, ScoreInput
from tests.mock_engine import ClassifyingEngine, EmbeddingEngine, MockEngine, ScoringEngine, mock_service


def texts(*pairs):
    return pb.ScoreRequest(pairs=[pb.ScorePair(texts=pb.TextPair(first=a, second=b)) for a, b in pairs])


def of_tokens(*ids):
    return pb.EmbedInput(token_ids=pb.TokenIds(ids=ids))


async def test_embed_texts_and_tokens_in_one_call(serve):
    async with serve(EmbeddingEngine()) as s:
        wire = pb.EmbedRequest(inputs=[of_tokens(3, 4), pb.EmbedInput(text="<s>a")], pooling="mean")
        reply = await s.inference.Embed(wire)
        assert np.allclose(reply.embeddings[0].values, [0.6, 0.8, 0, 0])
        assert [e.prompt_tokens for e in reply.embeddings] == [2, 5]
        assert s.engine.embedded == [(3, 4), (256, *b"<s>a")], "control tokens in a text are text"
        assert s.engine.poolings == ["mean", "mean"]
        short = await s.inference.Embed(pb.EmbedRequest(inputs=[of_tokens(3, 4, 9)], dimensions=2))
        assert np.allclose(short.embeddings[0].values, [0.6, 0.8])
        cut = await s.inference.Embed(pb.EmbedRequest(inputs=[of_tokens(*range(9))], truncate_prompt_tokens=3))
        assert cut.embeddings[0].prompt_tokens == 3 and s.engine.embedded[-1] == (6, 7, 8)


@pytest.mark.parametrize(
    ("wire", "param"),
    [
        (pb.EmbedRequest(), "inputs"),
        (pb.EmbedRequest(inputs=[pb.EmbedInput()]), "prompt"),
        (pb.EmbedRequest(inputs=[pb.EmbedInput(text="")]), "prompt"),
        (pb.EmbedRequest(inputs=[of_tokens(10**6)]), "prompt"),
        (pb.EmbedRequest(inputs=[of_tokens(*[1] * 513)]), "prompt"),
        (pb.EmbedRequest(inputs=[of_tokens(1)] * 1025), "inputs"),
        (pb.EmbedRequest(inputs=[of_tokens(1)], dimensions=5), "dimensions"),
        (pb.EmbedRequest(inputs=[of_tokens(1)], dimensions=0), "dimensions"),
        (pb.EmbedRequest(inputs=[of_tokens(1)], truncate_prompt_tokens=0), "truncate_prompt_tokens"),
        (pb.EmbedRequest(inputs=[of_tokens(1)], request_id="x" * 300), "request_id"),
        (pb.ScoreRequest(), "pairs"),
        (pb.ScoreRequest(pairs=[pb.ScorePair()]), "pairs[0]"),
        (texts(("", "a")), "pairs[0].first"),
        (texts(*[("a", "b")] * 1025), "pairs"),
        (pb.ScoreRequest(pairs=[pb.ScorePair(tokens=pb.TokenPair(token_ids=[1]))]), "pairs"),
    ],
)
async def test_wrong_requests_name_their_field(serve, wire, param):
    async with serve(EmbeddingEngine()) as s:
        call = s.inference.Embed if isinstance(wire, pb.EmbedRequest) else s.inference.Score
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(wire)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(caught.value.trailing_metadata())["jaxserve-error-param"] == param


async def test_score_by_the_model_or_by_cosine(serve):
    async with serve(ScoringEngine()) as s:
        reply = await s.inference.Score(texts(("abc", "abx"), ("abc", "xyz")))
        assert np.allclose(reply.scores, [2 / 3, 0]) and reply.prompt_tokens == 14
        lame = pb.ScoreRequest(pairs=[pb.ScorePair(tokens=pb.TokenPair(token_ids=[1, 2], segment_ids=[0]))])
        with pytest.raises(grpc.aio.AioRpcError, match="2 token ids and 1 segment ids"):
            await s.inference.Score(lame)
        for segment in (2, 2**32 - 1):  # the latter is no int32, which would end the engine
            pair = pb.TokenPair(token_ids=[1, 2], segment_ids=[0, segment])
            with pytest.raises(grpc.aio.AioRpcError, match=f"segment id {segment}") as caught:
                await s.inference.Score(pb.ScoreRequest(pairs=[pb.ScorePair(tokens=pair)]))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    async with serve(EmbeddingEngine()) as s:
        reply = await s.inference.Score(texts(("ab", "ab")))
        assert np.allclose(reply.scores, [1.0])


async def test_models_that_cannot_say_so(serve):
    async with serve(MockEngine()) as s:
        for call in (
            s.inference.Embed(pb.EmbedRequest(inputs=[of_tokens(1)])),
            s.inference.Score(texts(("a", "b"))),
            s.inference.Classify(pb.ClassifyRequest(inputs=[of_tokens(1)])),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_through_a_gateway(serve):
    async with serve(EmbeddingEngine()) as embeds, serve(ScoringEngine()) as scores:
        clients = [await RemoteEngineClient.connect(s.target) for s in (embeds, scores)]
        assert [client.info().tasks for client in clients] == [("generate", "embed"), ("score",)]
        try:
            service = mock_service(Pool(clients[:1]))
            found = await service.embed(GenerateInput(text="ab"), pooling="last")
            assert np.allclose(found.vector, np.array([256, 97, 98, 0]) / np.linalg.norm([256, 97, 98]))
            assert embeds.engine.poolings == ["last"]
            service = mock_service(Pool(clients[1:]))
            found = await service.score(ScoreInput([("abc", "abx")]))
            assert np.allclose(found.values, [2 / 3]) and len(scores.engine.scored) == 1
        finally:
            for client in clients:
                await client.close()


async def test_labels_here_and_through_a_gateway(serve):
    async with serve(ClassifyingEngine()) as s:
        wire = pb.ClassifyRequest(inputs=[of_tokens(1, 3, 4, 5), pb.EmbedInput(text="bb")])
        reply = await s.inference.Classify(wire)
        assert list(reply.labels) == ["even", "odd"] and [c.prompt_tokens for c in reply.classifications] == [4, 3]
        assert np.allclose([c.values for c in reply.classifications], [[0.25, 0.75], [1, 0]])
        wire.raw = True
        assert list((await s.inference.Classify(wire)).classifications[0].values) == [1, 3]
        cut = pb.ClassifyRequest(inputs=[of_tokens(*range(9))], truncate_prompt_tokens=3)
        assert (await s.inference.Classify(cut)).classifications[0].prompt_tokens == 3
        assert s.engine.classified[-1] == (0, 1, 2), "what is only read is cut at its end"
        client = await RemoteEngineClient.connect(s.target)
        try:
            assert client.info().labels == ("even", "odd")
            found = await mock_service(Pool([client])).classify(GenerateInput(token_ids=[1, 2, 3, 5]))
            assert found.values == (0.25, 0.75)
        finally:
            await client.close()
        for wrong in (pb.ClassifyRequest(), pb.ClassifyRequest(inputs=[of_tokens(1)] * 1025)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await s.inference.Classify(wrong)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_gateway_knows_the_prompts_of_the_models_authors(serve):
    engine = EmbeddingEngine()
    engine._info = dataclasses.replace(engine._info, prompts=(("query", "q: "), ("text", "t: ")), default_prompt="t: ")
    async with serve(engine) as s:
        client = await RemoteEngineClient.connect(s.target)
        try:
            service = mock_service(Pool([client]))
            await service.embed(GenerateInput(text="a"))
            await service.embed(GenerateInput(text="a"), prompt_name="query")
        finally:
            await client.close()
    assert engine.embedded == [(256, *b"t: a"), (256, *b"q: a")]


async def test_a_gateway_asks_the_others_where_one_refuses():
    full, good = EmbeddingEngine(), EmbeddingEngine()
    full.fail_next = "full"
    pool = Pool([full, good])
    for _ in range(4):
        await pool.embed("r", (3, 4))
    assert len(good.embedded) == 4
    good.fail_next = "full too"
    with pytest.raises(RequestError) as caught:
        await pool.embed("r", (3, 4))
    assert caught.value.kind is ErrorKind.RESOURCE_EXHAUSTED
