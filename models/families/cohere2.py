"""Command R7B and Command A (Cohere 2025, arXiv:2504.00698): attention and feed-forward beside each other behind one norm;
layers with a window rotate neighbouring pairs, the others do not rotate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from models.api import Step
from models.config import ModelConfig, from_hf, windows_from_hf
from models.decoder import Decoder
from models.family import Family
from models.layers import Build, GatedMLP, LayerNorm, child_recipes
from models.layers.attention import Attention, heads_of
from models.recipes import Recipes
from ops.paged_attention import attend
from ops.rope import rope


class Cohere2Attention(Attention):
    def attend(self, qkv_TKgh: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any]:
        q_TKGh, k_TKh, v_TKh = heads_of(qkv_TKgh)
        rotary = self.rotary
        if rotary is not None:
            q_TKGh, k_TKh = (rope(x, step.positions_T, *rotary, interleaved=True) for x in (q_TKGh, k_TKh))
        return attend(q_TKGh, k_TKh, v_TKh, kv, step.attention, **self.scoring)


class Cohere2Layer(nnx.Module):
    """x + attn(norm(x)) + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, index: int, build: Build):
        self.norm = LayerNorm(config.embed_dim, config.norm_eps, bias=False)
        self.attn = Cohere2Attention(config, index, build)
        self.mlp = GatedMLP(config, build)

    def __call__(self, x_TD: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any, tuple[jax.Array, ...]]:
        normed_TD = self.norm(x_TD)
        x_TD, kv = self.attn(normed_TD, step, kv, residual_TD=x_TD)
        normed_TD, x_TD = step.asked(normed_TD), step.asked(x_TD)
        x_TD, visited = self.mlp(normed_TD, step, residual_TD=x_TD)
        return x_TD, kv, visited

    def recipes(self, name: str) -> Recipes:
        return child_recipes(self, {"norm": "input_layernorm", "attn": "self_attn", "mlp": "mlp"}, name)


class Cohere2(Decoder):
    def __init__(self, config: ModelConfig, build: Build):
        super().__init__(config, build, Cohere2Layer)

    def make_norm(self, config: ModelConfig) -> LayerNorm:
        return LayerNorm(config.embed_dim, config.norm_eps, bias=False)


def cohere2_config(hf: Mapping[str, Any]) -> ModelConfig:
    layers, every = hf["num_hidden_layers"], hf.get("sliding_window_pattern") or 4
    kinds = hf.get("layer_types") or [
        "sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)
    ]
    windows = windows_from_hf({"sliding_window": hf.get("sliding_window"), "layer_types": kinds}, layers)
    bias = bool(hf.get("attention_bias", False))
    return from_hf(
        hf,
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        logits_scale=hf.get("logit_scale", 0.0625),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        windows=windows,
        rope_layers=tuple(window is not None for window in windows),
        qkv_bias=bias,
        out_bias=bias,
    )


FAMILIES = (
    Family("Command R7B, Command A (Cohere 2)", ("Cohere2ForCausalLM",), cohere2_config, Cohere2, gguf=("cohere2",)),
)
