from __future__ import annotations

import dataclasses
import json

import numpy as np
from safetensors.numpy import save_file

from models.loading.load import load_model, resolve
from models.loading.opening import open_checkpoint
from scripts import compare_rounding as script
from scripts.perplexity import log_probabilities
from tests.models.loading.test_load import HF, tensors


def test_channels_in_another_order_compute_the_same(tmp_path):
    arrays = tensors(np.random.default_rng(0))
    bias = np.random.default_rng(1).standard_normal(16).astype(np.float32)
    arrays |= {
        f"model.layers.0.self_attn.{name}.bias": bias[:rows]
        for name, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8))
    }
    save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps(HF | {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False})
    )
    opened = open_checkpoint(resolve(str(tmp_path)))
    moved = script.Reordered(opened.checkpoint, opened.hf_config)
    assert not np.allclose(
        moved.read("model.layers.0.mlp.down_proj.weight"), arrays["model.layers.0.mlp.down_proj.weight"]
    )
    tokens, found = np.random.default_rng(2).integers(0, 32, 12).tolist(), []
    for checkpoint in (opened.checkpoint, moved):
        seen = dataclasses.replace(opened, checkpoint=checkpoint)
        model = load_model(opened.source, opened=seen, max_model_len=16, progress=False).model
        found += [(piece, np.asarray(rows[:11])) for piece, rows in log_probabilities(model, tokens, 16)]
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-4)
    same = script.compare(found[:1], model, tokens, 16)
    assert abs(same["nats_1e-3"]) < 0.1 and same["agreement"] == 1.0
    assert script.bits_of(model) == 32
