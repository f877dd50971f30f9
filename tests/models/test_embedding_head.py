"""Pooling and what sentence-transformers directories put behind it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from models.embedding_head import EmbeddingHead, embedding_head, max_sequence
from models.pooling import MODES, pool

RNG = np.random.default_rng(0)


def test_modes():
    length = jnp.array([3, 1])
    hidden = np.concatenate([np.arange(12.0).reshape(4, 3), RNG.standard_normal((4, 3))]).reshape(2, 4, 3)
    one = hidden[0, :3]
    wanted = {
        "mean": one.mean(0),
        "cls": one[0],
        "last": one[2],
        "max": one.max(0),
        "weightedmean": (one * [[1], [2], [3]]).sum(0) / 6,
        "mean_sqrt_len": one.sum(0) / np.sqrt(3),
    }
    assert set(wanted) == set(MODES)
    for mode, values in wanted.items():
        pooled = pool(jnp.asarray(hidden), jnp.array([3, 0]), mode, normalize=False)
        np.testing.assert_allclose(pooled, [values, np.zeros(3)], rtol=1e-6)
        np.testing.assert_allclose(
            pool(jnp.asarray(hidden), jnp.array([3, 1]), mode)[0], values / np.linalg.norm(values), rtol=1e-5
        )
    with pytest.raises(ValueError, match="'median'"):
        pool(jnp.asarray(hidden), length, "median")


OLD = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "last": "pooling_mode_lasttoken",
}
NEW = {mode: mode for mode in MODES} | {"last": "lasttoken", "mean_sqrt_len": "mean_sqrt_len_tokens"}


@pytest.mark.parametrize("mode", MODES)
def test_poolings_of_every_version(tmp_path, mode):
    (tmp_path / "1_Pooling").mkdir()
    asked = tmp_path / "1_Pooling" / "config.json"
    asked.write_text(json.dumps(dict.fromkeys(OLD.values(), False) | {OLD[mode]: True, "include_prompt": True}))
    assert embedding_head(tmp_path, "mean").modes == (mode,)
    asked.write_text(json.dumps({"embedding_dimension": 3, "pooling_mode": NEW[mode], "include_prompt": True}))
    assert embedding_head(tmp_path, "mean").modes == (mode,)


def test_several_poolings_and_none(tmp_path):
    assert embedding_head(tmp_path, "last") == EmbeddingHead(("last",))
    (tmp_path / "1_Pooling").mkdir()
    asked = tmp_path / "1_Pooling" / "config.json"
    asked.write_text(json.dumps({OLD["cls"]: True, OLD["mean"]: True}))
    assert embedding_head(tmp_path, "mean").pooling == "cls+mean"
    asked.write_text(json.dumps({"pooling_mode": ["mean", "max"]}))
    assert embedding_head(tmp_path, "mean").modes == ("mean", "max")
    asked.write_text(json.dumps({"pooling_mode": "attention"}))
    with pytest.raises(ValueError, match="the pooling 'attention'; supported: mean, cls"):
        embedding_head(tmp_path, "mean")


def module(kind, path=""):
    return {"type": f"sentence_transformers.models.{kind}", "path": path}


def write_dense(folder, activation, bias=True):
    folder.mkdir()
    arrays = {"linear.weight": RNG.standard_normal((5, 3)).astype(np.float32)}
    if bias:
        arrays["linear.bias"] = RNG.standard_normal(5).astype(np.float32)
    save_file(arrays, folder / "model.safetensors")
    config = {
        "in_features": 3,
        "out_features": 5,
        "bias": bias,
        "activation_function": f"torch.nn.modules.activation.{activation}",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return arrays


@pytest.mark.parametrize("activation", ["Tanh", "Identity", "ReLU", "GELU", "SiLU", "Sigmoid"])
def test_dense_layers(tmp_path, activation):
    torch = pytest.importorskip("torch")
    arrays = write_dense(tmp_path / "2_Dense", activation, bias=activation != "Identity")
    steps = [
        module("Transformer"),
        module("Pooling", "1_Pooling"),
        module("Dense", "2_Dense"),
        module("Normalize", "3_Normalize"),
    ]
    (tmp_path / "modules.json").write_text(json.dumps(steps))
    x = RNG.standard_normal((4, 3)).astype(np.float32)
    y = torch.tensor(x) @ torch.tensor(arrays["linear.weight"]).T + torch.tensor(arrays.get("linear.bias", 0.0))
    wanted = torch.nn.functional.normalize(getattr(torch.nn, activation)()(y)).numpy()
    np.testing.assert_allclose(embedding_head(tmp_path, "mean").finish(x), wanted, rtol=2e-5, atol=5e-6)


def test_steps_that_are_not_supported(tmp_path):
    (tmp_path / "modules.json").write_text(json.dumps([module("Transformer"), module("Pooling"), module("LSTM")]))
    with pytest.raises(ValueError, match="the step 'LSTM'"):
        embedding_head(tmp_path, "mean")
    write_dense(tmp_path / "2_Dense", "Softplus")
    (tmp_path / "modules.json").write_text(json.dumps([module("Dense", "2_Dense")]))
    with pytest.raises(ValueError, match="the activation 'Softplus'"):
        embedding_head(tmp_path, "mean")


def test_prompts_and_lengths(tmp_path):
    assert max_sequence(tmp_path) is None
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 256}')
    assert max_sequence(tmp_path) == 256
    said = {"prompts": {"query": "query: ", "document": "passage: "}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(said))
    head = embedding_head(tmp_path, "mean")
    assert (head.prompts, head.default_prompt) == ((("query", "query: "), ("document", "passage: ")), "query: ")
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(said | {"default_prompt_name": None}))
    assert embedding_head(tmp_path, "mean").default_prompt == ""
