"""A traced model in the engine: what requests share, wait for and lose changes no token."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.adapters.attach import attach
from models.bridge import check, eager, family
from models.bridge.tracing import trace
from models.layers import Build, Linear
from models.loading import opening
from models.loading.load import fill
from models.loading.source import resolve
from models.parameters import quantizable
from ops.paged_attention.groups import KVGroups, layers_per_page
from serving.engine.api.config import EngineConfig
from serving.engine.api.sampling_params import SamplingParams, StructuredOutputs
from serving.engine.api.speculative import SpeculativeConfig
from serving.engine.api.types import EngineRequest
from serving.text.grammar import GrammarCompiler
from serving.training import prepare
from serving.training.settings import Settings
from tests.models.adapters.beside import Beside
from tests.models.bridge import tiny
from tests.models.bridge.sweep import traced
from tests.models.tiny_reference import QUICK
from tests.serving.engine import grammars
from tests.serving.engine.test_hybrid import Foreseen
from tests.tiny import tiny_engine

ROOT = Path(__file__).parents[3]
KIND, ARCHITECTURE = "afmoe", "AfmoeForCausalLM"
LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}  # the second has a mixture
STEM, NEW = 33, 16
NGRAM = SpeculativeConfig("ngram", num_speculative_tokens=2, enable_adaptive_verification=False)


@pytest.fixture(scope="module")
def made():
    return tiny.model(KIND, ARCHITECTURE, **LAYERS)


@pytest.fixture(scope="module")
def opened(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp(KIND)
    made.save_pretrained(folder)
    return traced(opening.open_checkpoint, resolve(str(folder)), ARCHITECTURE)


def filled(opened, **options):
    config = opened.family.config(opened.hf_config)
    build = Build(jnp.float32, jnp.float32, None, max_model_len=64)
    model = opened.family.build(config, build)
    fill(model, opened.checkpoint, build, progress=False, **options)
    return model


def test_shared_prefixes_preemption_and_drafts_change_no_token(made, opened):
    """Prompts that begin alike, more than run at once, with fewer pages than they need together; guesses of which every fifth is
    wrong."""
    model = filled(opened)
    expected = [tokens for tokens, _ in tiny.expected(made, prompts=(STEM + 8, STEM + 3, 40, 7, 21), new=NEW)]
    per_page = layers_per_page(model.kv_specs(), 64)
    groups = len(KVGroups.of(model.kv_specs(), per_page).windows)
    pages = 1 + 8 + 4 * (groups - 1) + 1  # the longest request's, and one
    how = EngineConfig(page_size=8, progress=False, speculative_config=NGRAM)
    engine = tiny_engine(
        how,
        model=model,
        num_pages=pages,
        max_num_seqs=2,
        layers_per_page=per_page,
        max_num_batched_tokens=32,
        max_model_len=64,
    )

    known = {tuple(one[:-NEW]): one[-NEW:] for one in expected}
    engine.scheduler.drafts._guesses = lambda request: Foreseen(known, request)

    compiler = GrammarCompiler(grammars.tokenizer(), made.config.vocab_size)
    pattern = "(ab|abc){2,3}-[0-9]{2,4}"
    constrained = compiler.compile(StructuredOutputs(regex=pattern))

    async def answer(name, prompt, constraint=None):
        stops = (grammars.END,) if constraint else ()
        params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=constraint is None, stop_token_ids=stops)
        request, tokens, cached = EngineRequest(name, tuple(prompt), params, constraint=constraint), [], 0
        async for output in engine.client.generate(request):
            tokens += output.token_ids
            cached = max(cached, output.num_cached_tokens)
        return tokens, cached

    async def all_of_them():
        first = await asyncio.gather(*(answer(f"a{i}", one[:-NEW]) for i, one in enumerate(expected)))
        again = await asyncio.gather(*(answer(f"b{i}", one[:-NEW]) for i, one in enumerate(expected)))
        last = expected[-1][:-NEW]
        written, _ = await answer("grammar", last, constrained())
        return first, [*again, *[await answer(f"c{i}", last) for i in range(2)]], written

    first, again, written = asyncio.run(all_of_them())
    counters = engine.scheduler.counters
    engine.shutdown()
    engine.runner.guard.check()
    assert 0 < counters.accepted_tokens < counters.draft_tokens and counters.preemptions > 0
    assert [tokens for tokens, _ in first] == [one[-NEW:] for one in expected]
    assert [tokens for tokens, _ in again] == [one[-NEW:] for one in (*expected, *expected[-1:] * 2)]
    assert again[-1][1] >= 16, "the same prompt right before"
    text = grammars.tokenizer().decode([token for token in written if token != grammars.END])
    assert re.fullmatch(pattern, text), text


def test_it_is_not_trained(opened, monkeypatch):
    monkeypatch.setattr(prepare, "open_checkpoint", lambda source: opened)
    with pytest.raises(ValueError, match="it has no backward pass here"):
        prepare.prepare(Settings((Path("none.jsonl"),), Path("nowhere"), model=str(opened.source.path)))


def test_products_are_quantized_and_routers_are_not(opened):
    model = filled(opened, quantization="int8")
    narrow = set(quantizable(model))
    exact = [
        path
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear) and getattr(module, "exact", False)
    ]
    assert len(narrow) > 10 and exact
    assert not {".".join(map(str, (*path, "weight"))) for path in exact} & narrow


def test_products_take_adapters_by_the_checkpoints_names(opened):
    room = attach(filled(opened), slots=2, max_rank=4, mesh=None)
    names = {name for site in room.sites for name in site.tensors}
    assert {f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"} <= names
    assert "model.layers.0.mlp.gate_proj.weight" in names and "lm_head.weight" in names


def test_an_adapter_changes_logits_as_pefts_does(made, opened, tmp_path):
    import peft
    import torch

    targets = [*(f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")), "lm_head", "embed_tokens"]
    config = peft.LoraConfig(r=3, lora_alpha=9, target_modules=targets, rank_pattern={"layers.0.*_proj": 2})
    wrapped = peft.get_peft_model(copy.deepcopy(made), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.normal_(0.0, 0.15)
    wrapped.save_pretrained(tmp_path / "adapter")
    tokens = check.some_tokens(made.config.vocab_size)
    wanted = eager.eager_logits(wrapped, tokens)
    assert np.abs(wanted - eager.eager_logits(made, tokens)).max() > 0.1
    adapted = Beside(filled(opened), tmp_path / "adapter", opened.checkpoint)
    assert check.difference(adapted, tokens, wanted) < 1e-4


def test_bfloat16_is_recorded_by_itself(made, opened, monkeypatch):
    """Where activations are narrower transformers rounds in other places, and the trace is another one."""
    monkeypatch.setattr(family, "trace_of", lambda hf, dtype: trace(dict(hf), dtype))
    config = opened.family.config(opened.hf_config)
    model = opened.family.build(config, Build(jnp.bfloat16, jnp.bfloat16, None, max_model_len=64))
    fill(model, opened.checkpoint, Build(jnp.bfloat16, jnp.bfloat16, None, max_model_len=64), progress=False)
    tokens = check.some_tokens(made.config.vocab_size)[:40]
    assert 1e-4 < check.difference(model, tokens, eager.eager_logits(made, tokens)) < 0.05


def on_four_devices(opened, mesh, expected, new):
    """What `mesh_run` finds of prompts, in a process of its own, which has four devices."""
    told = {"architecture": ARCHITECTURE, "prompts": [one[:-new] for one in expected], "new": new}
    command = [sys.executable, "-m", "tests.models.bridge.mesh_run", str(opened.source.path), mesh]
    run = subprocess.run(
        command, input=json.dumps(told), cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_weights_are_cut_over_a_mesh(made, opened):
    """Products by transformers' plan, experts by ours."""
    expected = [tokens for tokens, _ in tiny.expected(made, prompts=(21, 7), new=5)]
    found = on_four_devices(opened, "expert=2,model=2", expected, 5)
    assert found["tokens"] == expected
    assert found["cut"] > 10


@pytest.mark.slow
def test_replicas_of_a_cut_model(made, opened):
    expected = [tokens for tokens, _ in tiny.expected(made, prompts=(21, 7, 33, 34, 12, 25), new=8)]
    found = on_four_devices(opened, "data=2,model=2", expected, 8)
    assert found["tokens"] == expected
    assert found["cut"] > 10 and min(found["placed"]) > 0 and found["hits"] > 0
