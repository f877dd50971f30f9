"""Encoders against transformers: tiny random ones, and MiniLM where JAXSERVE_TEST_MODELS has it."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.loading.load import load_model, resolve
from models.pooling import pool, pooling_mode

FOLDER = os.environ.get("JAXSERVE_TEST_MODELS")
MINILM = Path(FOLDER) / "minilm" if FOLDER else None


def run(model, texts: list[list[int]], mode="mean"):
    graphdef, state = nnx.split(model)

    @jax.jit
    def encode(state, tokens_BS, length_B):
        hidden = nnx.merge(graphdef, state).encode(tokens_BS, length_B)
        return hidden, pool(hidden, length_B, mode)

    length = np.array([len(text) for text in texts] + [0], np.int32)
    tokens = np.zeros((len(length), max(length) + 3), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    hidden, pooled = encode(state, tokens, length)
    assert not np.asarray(pooled[-1]).any()
    return np.asarray(hidden), np.asarray(pooled)


def test_tiny(tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    reference = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    reference.save_pretrained(tmp_path)
    loaded = load_model(resolve(str(tmp_path)), progress=False)
    texts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [1]]
    hidden, _ = run(loaded.model, texts)
    for row, text in enumerate(texts):
        with torch.no_grad():
            wanted = reference(torch.tensor([text])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(hidden[row, : len(text)], wanted, atol=1e-4 * np.abs(wanted).max())


def test_modes():
    hidden = jnp.arange(24.0).reshape(2, 4, 3)
    length = jnp.array([3, 1])
    assert pool(hidden, length, "mean", normalize=False)[0].tolist() == [3, 4, 5]
    assert pool(hidden, length, "cls", normalize=False)[0].tolist() == [0, 1, 2]
    assert pool(hidden, length, "last", normalize=False)[0].tolist() == [6, 7, 8]
    np.testing.assert_allclose(jnp.linalg.norm(pool(hidden, length, "mean"), axis=-1), 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match="'max'"):
        pool(hidden, length, "max")


def test_mode_of_a_directory(tmp_path):
    assert pooling_mode(tmp_path) == "mean"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert pooling_mode(tmp_path) == "cls"


@pytest.mark.skipif(MINILM is None or not MINILM.exists(), reason="JAXSERVE_TEST_MODELS has no folder minilm")
def test_minilm(tmp_path):
    import tokenizers
    import torch
    import transformers
    from safetensors.torch import load_file

    texts = ["A man is eating food.", "Someone has a meal.", "The stock market fell by 3 % on Tuesday.", "ja"]
    tokenizer = tokenizers.Tokenizer.from_file(str(MINILM / "tokenizer.json"))
    tokenizer.no_padding()
    ids = [tokenizer.encode(text).ids for text in texts]
    _, vectors = run(load_model(resolve(str(MINILM)), progress=False).model, ids)
    config = transformers.BertConfig.from_pretrained(MINILM)
    reference = transformers.BertModel(config).eval()
    weights = load_file(next(MINILM.glob("*.safetensors")))
    weights = {name: value.float() for name, value in weights.items() if not name.endswith("position_ids")}
    reference.load_state_dict(weights, strict=False)
    for row, text in enumerate(ids):
        with torch.no_grad():
            wanted = reference(torch.tensor([text])).last_hidden_state[0].mean(0).numpy()
        cosine = vectors[row] @ wanted / np.linalg.norm(wanted)
        assert cosine > 1 - 1e-6
    similar, other = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert similar > 0.6 > 0.3 > other
