"""A model whose attention is sparse behind an indexer, in the engine: what requests share, wait for and lose changes no token, from
contexts in which everything is chosen to those in which a third is."""

from __future__ import annotations

import asyncio

import jax.numpy as jnp
import numpy as np
import pytest

from models.loading.load import load_model
from models.loading.source import resolve
from models.parameters import quantizable
from serving.engine.api.config import EngineConfig
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.speculative import SpeculativeConfig
from serving.engine.api.types import EngineRequest
from tests.serving.engine.test_hybrid import Foreseen
from tests.tiny import tiny_engine

NEW = 16
NGRAM = SpeculativeConfig("ngram", num_speculative_tokens=2, enable_adaptive_verification=False)


@pytest.fixture(scope="module")
def folder(references):
    return references("glm-5, layers that share")


def loaded(folder, **options):
    return load_model(resolve(str(folder)), dtype=jnp.float32, max_model_len=96, progress=False, **options).model


def test_shared_prefixes_preemption_and_drafts_change_no_token(folder):
    reference = np.load(folder / "reference.npz")
    texts = [reference["tokens0"][:end].tolist() for end in (53, 58, 64)]
    texts += [reference["tokens1"][:end].tolist() for end in (37, 45)]
    how = EngineConfig(page_size=8, progress=False, speculative_config=NGRAM)
    engine = tiny_engine(
        how, model=loaded(folder), num_pages=12, max_num_seqs=2, max_num_batched_tokens=32, max_model_len=96
    )
    known = {tuple(text[:-NEW]): text[-NEW:] for text in texts}
    engine.scheduler.drafts._guesses = lambda request: Foreseen(known, request)

    async def answer(name, text):
        params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
        request, tokens, cached = EngineRequest(name, tuple(text[:-NEW]), params), [], 0
        async for output in engine.client.generate(request):
            tokens += output.token_ids
            cached = max(cached, output.num_cached_tokens)
        return tokens, cached

    async def twice():
        first = await asyncio.gather(*(answer(f"a{i}", text) for i, text in enumerate(texts)))
        return [*first, *[await answer(f"b{i}", texts[2]) for i in range(2)]]

    answers = asyncio.run(twice())
    counters = engine.scheduler.counters
    engine.shutdown()
    engine.runner.guard.check()
    assert 0 < counters.accepted_tokens < counters.draft_tokens and counters.preemptions > 0
    assert [tokens for tokens, _ in answers] == [text[-NEW:] for text in (*texts, texts[2], texts[2])]
    assert answers[-1][1] >= 32, "the same prompt right before"


def test_what_decides_between_positions_is_not_quantized(folder):
    narrow = {path for path in quantizable(loaded(folder)) if "indexer" in path}
    assert narrow == {f"layers.{layer}.attn.indexer.{part}.weight" for layer in (0, 3) for part in "qk"}
