"""Every architecture in the engine: requests that share prefixes, wait for pages and lose them get transformers' tokens.
Most are run where slow tests are."""

from __future__ import annotations

import asyncio

import jax.numpy as jnp
import numpy as np
import pytest

from models.loading.load import load_model
from models.loading.source import resolve
from ops.paged_attention.groups import KVGroups, layers_per_page
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.engine.cache.kv_windows import first_page, pages_of
from serving.engine.requests.cache_specs import recurrent_of
from tests.models.tiny import TINY
from tests.tiny import tiny_engine

NEW, PAGE, LONGEST, PIECE = 16, 8, 64, 32
REUSED = (LONGEST - NEW - 1) // PAGE * PAGE
"""Tokens of the longest prompt that may be found: not its last one, and whole pages."""
SNAPSHOTS = {"interval": 24, "tail": 8, "worth": 8}
QUICK_ONES = ("gemma 4, per-layer embeddings, shared pages",)
"""One with windows, two sizes of heads and layers that read others' pages; `tests/serving/engine` has a hybrid, a sparse and a
dense one."""


def engine_of(folder):
    """(an engine with pages for the longest request, what the prefix of the next one needs behind windows, and one more; whether
    there are any)."""
    model = load_model(resolve(str(folder)), dtype=jnp.float32, max_model_len=LONGEST, progress=False).model
    per_page = layers_per_page(model.kv_specs(), LONGEST)
    windows = KVGroups.of(model.kv_specs(), per_page).windows
    behind = [REUSED // PAGE - first_page(window, REUSED, PAGE) for window in windows if window is not None]
    recurrent = recurrent_of(model)
    engine = tiny_engine(
        model=model,
        num_pages=2 + pages_of(LONGEST, windows, PAGE) + (sum(behind) if None in windows else 0),
        page_size=PAGE,
        max_num_seqs=2,
        max_num_batched_tokens=PIECE,
        max_model_len=LONGEST,
        layers_per_page=per_page if per_page < len(model.kv_specs()) else None,
        num_snapshots=0 if recurrent is None else 12,
        snapshots=SNAPSHOTS,
    )
    return engine, bool(windows)


async def answer(engine, name, text):
    """(tokens, prompt tokens found computed) of a greedy completion behind all of the text but its last ones."""
    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    tokens, cached = [], 0
    async for output in engine.client.generate(EngineRequest(name, tuple(text[:-NEW]), params)):
        tokens += output.token_ids
        cached = max(cached, output.num_cached_tokens)
    return tokens, cached


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK_ONES else pytest.mark.slow) for name in TINY]
)
def test_shared_prefixes_and_preemption_change_no_token(name, references):
    folder = references(name)
    reference = np.load(folder / "reference.npz")
    texts = [reference["tokens0"][:end].tolist() for end in (53, 58, LONGEST)]
    texts += [reference["tokens1"][:end].tolist() for end in (37, 45)]
    engine, has_pages = engine_of(folder)

    async def together():
        first = await asyncio.gather(*(answer(engine, f"a{i}", text) for i, text in enumerate(texts)))
        return [*first, *[await answer(engine, f"b{i}", texts[2]) for i in range(2)]]

    answers = asyncio.run(together())
    counters = engine.scheduler.counters
    engine.shutdown()
    engine.runner.guard.check()
    assert [tokens for tokens, _ in answers] == [text[-NEW:] for text in (*texts, texts[2], texts[2])]
    assert answers[-1][1] == REUSED
    if len(engine.scheduler.config.windows) <= 2:  # of more groups most give back what a sequence leaves behind
        assert (counters.preemptions > 0) == has_pages
    if name.startswith("gemma 4"):  # layers of two kinds, which give pages behind windows back all the same
        assert set(engine.scheduler.config.windows) == {12, None}
