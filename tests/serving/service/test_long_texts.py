"""Texts beyond the context, embedded in pieces."""

from __future__ import annotations

import numpy as np
import pytest

from serving.errors import RequestError
from serving.service import GenerateInput, Limits
from tests.mock_engine import BOS, EmbeddingEngine, mock_service


async def test_a_long_text_is_the_mean_of_its_pieces():
    engine = EmbeddingEngine(max_model_len=100)
    service = mock_service(engine, limits=Limits.for_model(100, max_embed_len=250))
    found = await service.embed(GenerateInput(text="a" * 99 + "b" * 99 + "c" * 20))
    assert [len(ids) for ids in engine.embedded] == [100, 100, 21] and all(ids[0] == BOS for ids in engine.embedded)
    vectors = [np.asarray([BOS, char, char, char]) / np.linalg.norm([BOS, char, char, char]) for char in b"abc"]
    mean = np.average(vectors, axis=0, weights=[100, 100, 21])
    assert np.allclose(found.vector, mean / np.linalg.norm(mean), atol=1e-6) and found.vector.dtype == np.float32
    assert len(found.prompt_token_ids) == 219
    with pytest.raises(RequestError, match="maximum context length is 100 tokens") as refused:
        await service.embed(GenerateInput(text="a" * 260))
    assert refused.value.code == "context_length_exceeded"
    short = await service.embed(GenerateInput(text="abc"))
    assert engine.embedded[-1] == (BOS, *b"abc") and np.isclose(np.linalg.norm(short.vector), 1)
