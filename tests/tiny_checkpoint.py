"""A tiny random Llama as a Hugging Face directory, tokenizer included: for tests that start real server processes."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import models, pre_tokenizers

VOCAB, EMBED, FFW, LAYERS, HEADS, KV_HEADS, HEAD = 256, 48, 96, 2, 9, 3, 16
"""9 and 3 heads: no mesh of 2 or 4 divides them."""


def write_tiny_checkpoint(folder: pathlib.Path, seed: int = 7, embed: int = EMBED, ffw: int = FFW) -> pathlib.Path:
    """Writes the model to `folder`, which must not exist. Token i is the word `w<i>`; token 1 ends a completion."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": embed,
        "intermediate_size": ffw,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)

    ones = np.ones(embed, np.float32)
    tensors = {
        "model.embed_tokens.weight": matrix(VOCAB, embed),
        "lm_head.weight": matrix(VOCAB, embed),
        "model.norm.weight": ones,
    }
    for layer in range(LAYERS):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        tensors |= {
            f"model.layers.{layer}.input_layernorm.weight": ones,
            f"model.layers.{layer}.post_attention_layernorm.weight": ones,
            f"{attention}.q_proj.weight": matrix(HEADS * HEAD, embed),
            f"{attention}.k_proj.weight": matrix(KV_HEADS * HEAD, embed),
            f"{attention}.v_proj.weight": matrix(KV_HEADS * HEAD, embed),
            f"{attention}.o_proj.weight": matrix(embed, HEADS * HEAD),
            f"{mlp}.gate_proj.weight": matrix(ffw, embed),
            f"{mlp}.up_proj.weight": matrix(ffw, embed),
            f"{mlp}.down_proj.weight": matrix(embed, ffw),
        }
    save_file(tensors, folder / "model.safetensors")
    words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w1"}))
    return folder
