"""Encoders and cross-encoders against transformers: tiny random ones, and MiniLM where JAXSERVE_TEST_MODELS has it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.families.bert.bert import attend_texts
from models.label_head import LabelHead
from models.loading.load import load_model, resolve
from models.loading.opening import open_checkpoint
from models.pooling import pool

FOLDER = os.environ.get("JAXSERVE_TEST_MODELS")
MINILM = Path(FOLDER) / "minilm" if FOLDER else None
NOMIC = Path(FOLDER) / "nomic-embed-text-v1.5.f16.gguf" if FOLDER else None
TEXTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [3]]
TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
MODERN = {"local_attention": 6, "num_hidden_layers": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODERN |= {"cls_token_id": 1, "sep_token_id": 2}
GEMMA = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}
GEMMA |= {"use_bidirectional_attention": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODERS = {
    "ModernBertModel": "ModernBertConfig",
    "ModernBertForMaskedLM": "ModernBertConfig",
    "BertModel": "BertConfig",
    "NomicBertModel": "NomicBertConfig",
    "RobertaModel": "RobertaConfig",
    "XLMRobertaModel": "XLMRobertaConfig",
    "CamembertModel": "CamembertConfig",
    "DistilBertModel": "DistilBertConfig",
    "DistilBertForMaskedLM": "DistilBertConfig",
    "MPNetModel": "MPNetConfig",
    "Gemma3TextModel": "Gemma3TextConfig",
}
RERANKERS = {
    "ModernBertForSequenceClassification": "ModernBertConfig",
    "BertForSequenceClassification": "BertConfig",
    "RobertaForSequenceClassification": "RobertaConfig",
    "XLMRobertaForSequenceClassification": "XLMRobertaConfig",
    "CamembertForSequenceClassification": "CamembertConfig",
    "DistilBertForSequenceClassification": "DistilBertConfig",
}


def padded(texts: list[list[int]], more: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """tokens_BS and length_B; the last row is empty."""
    length = np.array([len(text) for text in texts] + [0], np.int32)
    tokens = np.zeros((len(length), max(length) + more), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    return tokens, length


def run(model, texts: list[list[int]], mode="mean"):
    graphdef, state = nnx.split(model)

    @jax.jit
    def encode(state, tokens_BS, length_B):
        hidden = nnx.merge(graphdef, state).encode(tokens_BS, length_B)
        return hidden, pool(hidden, length_B, mode)

    hidden, pooled = encode(state, *padded(texts))
    assert not np.asarray(pooled[-1]).any()
    return np.asarray(hidden), np.asarray(pooled)


def reference_model(architecture: str, config_class: str, folder: Path, **fields):
    import torch
    import transformers

    torch.manual_seed(0)
    own = {"ModernBertConfig": MODERN, "Gemma3TextConfig": GEMMA, "DistilBertConfig": {"hidden_dim": 48}}
    fields = own.get(config_class, {}) | fields
    config = getattr(transformers, config_class)(**TINY | fields)
    reference = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    reference.save_pretrained(folder)
    return reference


@pytest.mark.parametrize("architecture", ENCODERS)
def test_hidden_states(architecture, tmp_path):
    import torch

    reference = reference_model(architecture, ENCODERS[architecture], tmp_path)
    for name in ("model", "distilbert"):
        reference = getattr(reference, name, reference)  # of the masked language model, the encoder
    loaded = load_model(resolve(str(tmp_path)), progress=False)
    assert loaded.config.max_positions == (
        38 if any(name in architecture for name in ("Roberta", "MPNet", "Camembert")) else 40
    )
    hidden, _ = run(loaded.model, TEXTS)
    for row, text in enumerate(TEXTS):
        with torch.no_grad():
            wanted = reference(torch.tensor([text])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(hidden[row, : len(text)], wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("activation", ["sigmoid", "identity"])
@pytest.mark.parametrize("architecture", RERANKERS)
def test_scores(architecture, activation, tmp_path):
    import torch

    more = (
        {"type_vocab_size": 1} if "Roberta" in architecture or "Camembert" in architecture else {}
    )  # as published ones have
    if "Modern" in architecture:
        more = {"classifier_pooling": "mean" if activation == "identity" else "cls", "norm_bias": True}
    reference = reference_model(architecture, RERANKERS[architecture], tmp_path, num_labels=1, **more)
    if activation == "identity":
        path = tmp_path / "config.json"
        noted = {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}
        path.write_text(json.dumps(json.loads(path.read_text()) | noted))
    model = load_model(resolve(str(tmp_path)), progress=False).model
    tokens, length = padded(TEXTS)
    segments = (np.arange(tokens.shape[1]) >= 2).astype(np.int32) * (tokens > 0)
    logits = np.asarray(model.classify(model.encode(tokens, length, segments), length))
    scores = LabelHead.of(model.config).finish(logits)[:, 0]
    for row, text in enumerate(TEXTS):
        given = {"token_type_ids": torch.tensor(segments[row : row + 1, : len(text)])}
        more = given if architecture.startswith("Bert") else {}
        with torch.no_grad():
            logit = reference(torch.tensor([text]), **more).logits[0, 0]
        wanted = float(torch.sigmoid(logit)) if activation == "sigmoid" else float(logit)
        assert scores[row] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("problem", "architecture"),
    [
        (None, "BertForSequenceClassification"),
        ("single_label_classification", "ModernBertForSequenceClassification"),
        ("multi_label_classification", "RobertaForSequenceClassification"),
        ("regression", "BertForSequenceClassification"),
    ],
)
def test_labels(problem, architecture, tmp_path):
    """Probabilities are those of transformers' own pipeline for the type of problem."""
    import torch

    names = {0: "sad", 1: "glad", 2: "neither"}
    reference = reference_model(architecture, RERANKERS[architecture], tmp_path, id2label=names, problem_type=problem)
    model = load_model(resolve(str(tmp_path)), progress=False).model
    head = LabelHead.of(model.config)
    assert head.labels == ("sad", "glad", "neither") and not head.scores
    tokens, length = padded(TEXTS)
    logits = np.asarray(model.classify(model.encode(tokens, length), length))[: len(TEXTS)]
    for row, text in enumerate(TEXTS):
        with torch.no_grad():
            wanted = reference(torch.tensor([text])).logits[0]
        np.testing.assert_allclose(logits[row], wanted.numpy(), atol=1e-4)
        if problem == "multi_label_classification":
            wanted = torch.sigmoid(wanted)
        elif problem != "regression":
            wanted = torch.softmax(wanted, -1)
        np.testing.assert_allclose(head.finish(logits)[row], wanted.numpy(), atol=1e-4)


def test_labels_that_cannot_be_told_are_refused(tmp_path):
    reference_model("BertForSequenceClassification", "BertConfig", tmp_path, num_labels=3)
    path = tmp_path / "config.json"
    for change, word in (
        ({"id2label": {"1": "a", "2": "b"}}, "id2label"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.Tanh"}}, "Tanh"),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=word):
            load_model(resolve(str(tmp_path)), progress=False)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "a"}}))


@pytest.mark.parametrize("reach", [None, 5])
def test_long_texts_in_blocks(reach, monkeypatch):
    """Blocks of queries give what all queries at once give, whatever a token sees of its text."""
    rng = np.random.default_rng(0)
    q, k, v = jnp.asarray(rng.standard_normal((3, 2, 32, 4, 8)), jnp.float32)
    valid, bias = jnp.arange(32) < jnp.array([[32], [2]]), jnp.asarray(rng.standard_normal((4, 63)), jnp.float32)
    whole = np.asarray(attend_texts(q, k, v, valid, reach, bias))
    monkeypatch.setattr("models.families.bert.bert._QUERY_BLOCK", 8)
    blocks = np.asarray(attend_texts(q, k, v, valid, reach, bias))
    np.testing.assert_allclose(blocks[0], whole[0], atol=1e-5)
    np.testing.assert_allclose(blocks[1, :2], whole[1, :2], atol=1e-5)


@pytest.mark.skipif(MINILM is None or not MINILM.exists(), reason="JAXSERVE_TEST_MODELS has no folder minilm")
def test_minilm():
    import tokenizers
    import torch
    import transformers
    from safetensors.torch import load_file

    assert MINILM is not None
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


GGUF = {
    "bert": ("BertModel", "cls", {}),
    "modern-bert": (
        "ModernBertModel",
        "cls",
        {
            "attention.sliding_window": MODERN["local_attention"],
            "attention.sliding_window_pattern": 3,
            "rope.freq_base": 160000.0,
            "rope.freq_base_swa": 10000.0,
        },
    ),
    "gemma-embedding": (
        "Gemma3TextModel",
        "mean",
        {
            "attention.head_count_kv": GEMMA["num_key_value_heads"],
            "attention.key_length": GEMMA["head_dim"],
            "attention.sliding_window": GEMMA["sliding_window"],
            "attention.sliding_window_pattern": [True, False],
            "rope.freq_base": 1000000.0,
        },
    ),
}
"""GGUF's architecture -> transformers', the pooling that its files ask for, and keys of its own below the architecture."""


@pytest.mark.parametrize("arch", GGUF)
def test_through_gguf(arch, tmp_path):
    """A file as llama.cpp's converter writes it: its names, no pooler, how embeddings are made in the metadata, and what
    sentence-transformers has behind pooling as tensors."""
    import gguf
    import torch
    from safetensors.numpy import load_file

    architecture, pooling, own = GGUF[arch]
    scale = {"query_pre_attn_scalar": GEMMA["head_dim"]} if arch == "gemma-embedding" else {}  # as published
    reference = reference_model(architecture, ENCODERS[architecture], tmp_path, **scale)
    tensors = load_file(tmp_path / "model.safetensors")
    layers = reference.config.num_hidden_layers
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", arch)
    writer.add_block_count(layers)
    writer.add_context_length(TINY["max_position_embeddings"])
    writer.add_embedding_length(TINY["hidden_size"])
    writer.add_feed_forward_length(TINY["intermediate_size"])
    writer.add_head_count(TINY["num_attention_heads"])
    if arch == "gemma-embedding":
        writer.add_layer_norm_rms_eps(reference.config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps({"bert": 1e-12, "modern-bert": 1e-5}[arch])
    writer.add_pooling_type(gguf.PoolingType[pooling.upper()])
    add = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for key, value in own.items():
        add[type(value)](f"{arch}.{key}", value)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[arch], layers)
    for name, array in tensors.items():
        if name.startswith("pooler."):
            continue
        found = (names.get_name(known, try_suffixes=(".weight", ".bias")) for known in (name, f"model.{name}"))
        shift = 1.0 if arch == "gemma-embedding" and name.endswith("norm.weight") else 0.0
        writer.add_tensor(next(filter(None, found)), array + np.float32(shift))
    behind = {}
    if arch == "gemma-embedding":
        rng, width = np.random.default_rng(1), TINY["hidden_size"]
        behind = {"dense_2.weight": (24, width), "dense_3.weight": (width, 24)}
        behind = {name: rng.standard_normal(shape, np.float32) for name, shape in behind.items()}
    for name, array in behind.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = resolve(str(tmp_path / "tiny.gguf"))
    opened = open_checkpoint(source)
    assert opened.embedding.pooling == pooling
    assert opened.family.tasks == ("embed",)
    hidden, pooled = run(load_model(source, progress=False, opened=opened).model, TEXTS)
    for row, text in enumerate(TEXTS):
        with torch.no_grad():
            wanted = reference(torch.tensor([text])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(hidden[row, : len(text)], wanted, atol=1e-4 * np.abs(wanted).max())
    wanted = pooled
    for array in behind.values():
        wanted = wanted @ array.T
    wanted = wanted / np.maximum(np.linalg.norm(wanted, axis=-1, keepdims=True), 1e-12)
    np.testing.assert_allclose(opened.embedding.finish(pooled), wanted, atol=1e-5)


@pytest.mark.skipif(NOMIC is None or not NOMIC.exists(), reason="JAXSERVE_TEST_MODELS has no nomic-embed GGUF")
def test_nomic_gguf():
    """Against transformers' network with the file's own float16 weights."""
    import gguf
    import torch
    import transformers

    assert NOMIC is not None
    loaded = load_model(resolve(str(NOMIC)), progress=False)
    assert (loaded.embedding.pooling, loaded.config.max_positions) == ("mean", 2048)
    file = {tensor.name: tensor for tensor in gguf.GGUFReader(NOMIC).tensors}
    names = {
        "token_embd.": "embeddings.word_embeddings.",
        "token_types.": "embeddings.token_type_embeddings.",
        "token_embd_norm.": "embeddings.LayerNorm.",
        "blk.": "layers.",
        "attn_output_norm.": "post_attention_layernorm.",
        "layer_output_norm.": "post_mlp_layernorm.",
        "attn_output.": "self_attn.o_proj.",
        "ffn_up.": "mlp.up_proj.",
        "ffn_gate.": "mlp.gate_proj.",
        "ffn_down.": "mlp.down_proj.",
    }
    state = {}
    for name, tensor in file.items():
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if "attn_qkv" in name:
            base = name.removesuffix("attn_qkv.weight")
            state |= {f"{base}self_attn.{part}_proj.weight": v for part, v in zip("qkv", values.chunk(3), strict=True)}
        else:
            state[name] = values
    config = transformers.NomicBertConfig(
        vocab_size=len(state["embeddings.word_embeddings.weight"]), layer_norm_eps=1e-12
    )
    reference = transformers.NomicBertModel(config, add_pooling_layer=False).eval()
    reference.load_state_dict(state)
    texts = [[101, 3945, 1035, 23032, 1024, 2054, 2003, 1037, 4937, 102], list(range(1000, 1300))]
    _, vectors = run(loaded.model, texts)
    for vector, text in zip(vectors, texts, strict=False):
        with torch.no_grad():
            wanted = reference(torch.tensor([text])).last_hidden_state[0].mean(0).numpy()
        assert vector @ wanted / np.linalg.norm(wanted) > 1 - 1e-5
