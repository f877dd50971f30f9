"""Adapters with random matrices for tests: PEFT directories as the package `peft` writes them, without it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.tiny_checkpoint import VOCAB, write_tiny_checkpoint

EMBED, FFW, LAYERS, HEADS, KV_HEADS, HEAD = 48, 96, 2, 6, 3, 16
SIZES = {  # outputs, inputs of the base's weights
    "self_attn.q_proj": (HEADS * HEAD, EMBED),
    "self_attn.k_proj": (KV_HEADS * HEAD, EMBED),
    "self_attn.v_proj": (KV_HEADS * HEAD, EMBED),
    "self_attn.o_proj": (EMBED, HEADS * HEAD),
    "mlp.gate_proj": (FFW, EMBED),
    "mlp.up_proj": (FFW, EMBED),
    "mlp.down_proj": (EMBED, FFW),
}


def write_base(folder: Path, seed: int = 7, tied: bool = False) -> Path:
    """A tiny random Llama that transformers takes too, with the tokenizer of `tests.tiny_checkpoint`."""
    write_tiny_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"tie_word_embeddings": tied}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)

    tensors = {name: matrix(VOCAB, EMBED) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    if tied:
        del tensors["lm_head.weight"]
    tensors["model.norm.weight"] = np.ones(EMBED, np.float32)
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = np.ones(EMBED, np.float32)
        for target, size in SIZES.items():
            tensors[f"model.layers.{layer}.{target}.weight"] = matrix(*size)
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_adapter(
    folder: Path,
    *,
    rank: int = 4,
    targets: tuple[str, ...] = tuple(SIZES),
    seed: int = 0,
    embedding: bool = False,
    head: bool = False,
    **config,
) -> Path:
    """An adapter of `write_base`'s model, large enough to change what it says.

    Args:
        embedding, head: it changes these too.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for target in targets:
            outputs, inputs = SIZES[target]
            name = f"base_model.model.model.layers.{layer}.{target}"
            tensors[f"{name}.lora_A.weight"] = rng.standard_normal((rank, inputs)).astype(np.float32) * inputs**-0.5
            tensors[f"{name}.lora_B.weight"] = rng.standard_normal((outputs, rank)).astype(np.float32) * 0.5
    more = []
    if embedding:
        name = "base_model.model.model.embed_tokens"
        tensors[f"{name}.lora_embedding_A"] = rng.standard_normal((rank, VOCAB)).astype(np.float32)
        tensors[f"{name}.lora_embedding_B"] = rng.standard_normal((EMBED, rank)).astype(np.float32) * 0.1
        more.append("embed_tokens")
    if head:
        name = "base_model.model.lm_head"
        tensors[f"{name}.lora_A.weight"] = rng.standard_normal((rank, EMBED)).astype(np.float32) * EMBED**-0.5
        tensors[f"{name}.lora_B.weight"] = rng.standard_normal((VOCAB, rank)).astype(np.float32) * 0.5
        more.append("lm_head")
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [t.split(".")[1] for t in targets] + more,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return folder
