"""A traced model in the engine: what requests share, wait for and lose changes no token."""

from __future__ import annotations

import asyncio

import jax.numpy as jnp
import pytest
from flax import nnx

from models.adapters.attach import attach
from models.layers import Build, Linear
from models.loading import opening
from models.loading.load import fill
from models.loading.source import resolve
from models.parameters import quantizable
from ops.paged_attention.groups import layers_per_page
from serving.engine.api.config import EngineConfig
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from tests.models.bridge import tiny
from tests.models.bridge.sweep import traced
from tests.tiny import tiny_engine

KIND, ARCHITECTURE = "afmoe", "AfmoeForCausalLM"  # windows in three of four layers, and a mixture
STEM, NEW = 33, 5


@pytest.fixture(scope="module")
def made():
    return tiny.model(KIND, ARCHITECTURE)


@pytest.fixture(scope="module")
def opened(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp(KIND)
    made.save_pretrained(folder)
    return traced(opening.open_checkpoint, resolve(str(folder)), ARCHITECTURE)


def filled(opened, **options):
    config = opened.family.config(opened.hf_config)
    build = Build(jnp.float32, jnp.float32, None, max_model_len=128)
    model = opened.family.build(config, build)
    fill(model, opened.checkpoint, build, progress=False, **options)
    return model


def test_shared_prefixes_and_preemption_change_no_token(made, opened):
    """Prompts that begin alike, more than run at once, with fewer pages than they need together."""
    model = filled(opened)
    expected = [tokens for tokens, _ in tiny.expected(made, prompts=(STEM + 8, STEM + 3, 50, 7, 21), new=NEW)]
    per_page = layers_per_page(model.kv_specs(), 128)
    engine = tiny_engine(
        EngineConfig(page_size=8, progress=False), model=model, num_pages=40, max_num_seqs=3, layers_per_page=per_page
    )

    async def answer(name, prompt):
        params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
        request, tokens, cached = EngineRequest(name, tuple(prompt), params), [], 0
        async for output in engine.client.generate(request):
            tokens += output.token_ids
            cached = max(cached, output.num_cached_tokens)
        return tokens, cached

    async def all_of_them():
        first = await asyncio.gather(*(answer(f"a{i}", one[:-NEW]) for i, one in enumerate(expected)))
        again = await asyncio.gather(*(answer(f"b{i}", one[:-NEW]) for i, one in enumerate(expected)))
        return first, again

    first, again = asyncio.run(all_of_them())
    engine.shutdown()
    engine.runner.guard.check()
    assert [tokens for tokens, _ in first] == [one[-NEW:] for one in expected]
    assert [tokens for tokens, _ in again] == [one[-NEW:] for one in expected]
    assert sum(cached for _, cached in again) > 0


def test_products_are_quantized_and_routers_are_not(opened):
    model = filled(opened, quantization="int8")
    narrow = set(quantizable(model))
    exact = [
        path
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear) and getattr(module, "exact", False)
    ]
    assert len(narrow) > 12 and exact
    assert not {".".join(map(str, (*path, "weight"))) for path in exact} & narrow


def test_products_take_adapters_by_the_checkpoints_names(opened):
    room = attach(filled(opened), slots=2, max_rank=4, mesh=None)
    names = {name for site in room.sites for name in site.tensors}
    assert {f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"} <= names
    assert "model.layers.0.mlp.gate_proj.weight" in names and "lm_head.weight" in names
