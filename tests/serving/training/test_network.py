"""Gradients do not depend on how rows are put together, what is recomputed, or which devices compute."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from serving.training.lora import LoraSettings, sites
from tests.serving.training.tiny import Bench, examples, make_model, pack

LORA = LoraSettings(4, 8.0)


def close(found, expected, within=2e-5):
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, other, atol=within)


def with_b(bench):
    """Pairs that change something, the same for the same names."""
    rng = np.random.default_rng(0)
    for pair in bench.trained.values():
        pair["b"] = jax.device_put(rng.standard_normal(pair["b"].shape).astype(np.float32) * 0.1, pair["b"].sharding)
    return bench


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss"])  # windows, sinks
def test_packed_rows_accumulated_calls_and_recomputed_layers(name, tmp_path):
    make_model(name, tmp_path)
    texts = examples(6)
    alone = with_b(Bench(tmp_path, pack(texts, 160, packing=False), LORA))
    expected = alone.gradients(np.arange(6))
    rows = pack(texts, 160)
    assert len(rows) < 3 and rows.packed
    packed = with_b(Bench(tmp_path, rows, LORA, recompute=True))
    found = packed.gradients(np.arange(len(rows)))
    close(found, expected)
    calls = with_b(Bench(tmp_path, alone.rows, LORA, accumulates=True))
    close(calls.gradients(np.arange(4), np.array([4, 5, -1, -1])), expected)


def test_pairs_on_quantized_weights_learn(tmp_path):
    make_model("llama", tmp_path)
    rows = pack(examples(4), 96)
    bench = Bench(tmp_path, rows, LoraSettings(8, 16.0, dropout=0.1), quantization="int8", steps=30)
    plain = Bench(tmp_path, rows, LORA)
    assert bench.gradients(np.arange(len(rows)))[1] == pytest.approx(plain.gradients(np.arange(len(rows)))[1], abs=0.1)
    losses = [bench.step(np.arange(len(rows))) for _ in range(12)]
    assert losses[-1] < losses[0] - 0.05


def test_targets(tmp_path):
    from models.loading.load import load_model, resolve

    make_model("deepseek v3", tmp_path)
    model = load_model(resolve(str(tmp_path)), progress=False).model

    def taken(*targets):
        one = targets[0] if len(targets) == 1 else targets
        return sorted({name for site in sites(model, LoraSettings(targets=one)) for name in site.names})

    assert taken("q_a_proj", "kv_b_proj") == [
        f"model.layers.{layer}.self_attn.{part}.weight" for layer in range(2) for part in ("kv_b_proj", "q_a_proj")
    ]
    assert taken(r".*layers\.1\.self_attn\.o_proj") == ["model.layers.1.self_attn.o_proj.weight"]
    everything = taken("all-linear")
    assert "model.layers.0.mlp.up_proj.weight" in everything and "lm_head.weight" not in everything
    assert not any("experts.0" in name or name.endswith("mlp.gate.weight") for name in everything)
    with pytest.raises(ValueError, match=r"fits no weight of this model; its modules are .*kv_b_proj"):
        taken("query_key_value", "c_attn")
    with pytest.raises(ValueError, match=r"experts\.0\.\w+_proj .* cannot be changed by pairs"):
        taken(r".*experts\.\d+\..*")


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    """Gradients on meshes of CPU devices; one process, because their number is fixed at its start."""
    command = [sys.executable, "-m", "tests.serving.training.mesh_run", str(tmp_path_factory.mktemp("mesh"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", ["data=2", "model=2"])
@pytest.mark.parametrize("what", ["lora, heads spread", "full", "experts"])
def test_meshes_give_the_gradients_of_one_device(meshes, what, mesh):
    assert meshes[what][mesh] < 2e-5
