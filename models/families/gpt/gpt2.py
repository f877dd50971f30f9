"""GPT-2 (Radford et al. 2019): learned positions, layer norms, one head of K and V for each query head.

Its checkpoints store matrices [in, out] (Conv1D) and q, k and v in one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from models.api import Step
from models.config import ModelConfig, from_hf
from models.decoder import Decoder
from models.family import Family
from models.layers import MLP, Attention, Build, Layer, LayerNorm, Linear, weight
from models.recipes import Piece, Recipe, Recipes, deal, one, split, under
from ops.linear import embed


def _conv1d(linear: Linear, name: str) -> tuple[Piece, Piece]:
    """Weight and bias of a Conv1D."""
    outputs, inputs = linear.weight.stored_shape
    return Piece(f"{name}.weight", (inputs, outputs), turned=True), Piece(f"{name}.bias", (outputs,))


def _whole(linear: Linear, name: str) -> Recipes:
    weight, bias = _conv1d(linear, name)
    return {"weight": weight, "bias": bias}


class GPT2Attention(Attention):
    def __init__(self, config: ModelConfig, layer: int, build: Build):
        super().__init__(config, layer, build)
        if config.get("scale_by_layer"):
            self.scale /= layer + 1

    def recipes(self, name: str) -> Recipes:
        K, G, h = self.heads

        def by_head(piece: Piece) -> Recipe:
            return deal(K, *split(piece, K * G * h, K * h, K * h))

        weight, bias = _conv1d(self.qkv, f"{name}.c_attn")
        qkv: Recipes = {"qkv.weight": by_head(weight), "qkv.bias": by_head(bias)}
        return qkv | under("out", _whole(self.out, f"{name}.c_proj"))


class GPT2MLP(MLP):
    def recipes(self, name: str) -> Recipes:
        return under("up", _whole(self.up, f"{name}.c_fc")) | under("down", _whole(self.down, f"{name}.c_proj"))


class GPT2Layer(Layer):
    names: ClassVar[dict[str, str]] = {"attn_norm": "ln_1", "attn": "attn", "mlp_norm": "ln_2", "mlp": "mlp"}

    def make_norm(self, config: ModelConfig) -> LayerNorm:
        return LayerNorm(config.embed_dim, config.norm_eps)

    def make_attention(self, config: ModelConfig, index: int, build: Build) -> GPT2Attention:
        return GPT2Attention(config, index, build)

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> GPT2MLP:
        return GPT2MLP(config, build)


class GPT2(Decoder):
    names: ClassVar[dict[str, str]] = {"embed": "transformer.wte", "norm": "transformer.ln_f"}
    layer_name = "transformer.h"

    def __init__(self, config: ModelConfig, build: Build):
        super().__init__(config, build, GPT2Layer)
        self.positions = weight((config.max_positions, config.embed_dim), build.dtype, (None, "embed"))

    def make_norm(self, config: ModelConfig) -> LayerNorm:
        return LayerNorm(config.embed_dim, config.norm_eps)

    def embed_tokens(self, step: Step) -> jax.Array:
        return super().embed_tokens(step) + embed(self.positions[...], step.positions_T, self.compute_dtype)

    def recipes(self) -> Recipes:
        return super().recipes() | {"positions": one("transformer.wpe.weight", *self.positions.shape)}


def gpt2_config(hf: Mapping[str, Any]) -> ModelConfig:
    shared = {
        "hidden_size": hf.get("n_embd", hf.get("hidden_size")),
        "num_hidden_layers": hf.get("n_layer", hf.get("num_hidden_layers")),
        "num_attention_heads": hf.get("n_head", hf.get("num_attention_heads")),
        "vocab_size": hf.get("vocab_size"),
        "architectures": hf.get("architectures"),
        "tie_word_embeddings": hf.get("tie_word_embeddings", True),
        "max_position_embeddings": hf.get("n_positions", hf.get("max_position_embeddings", 1024)),
    }
    plain = hf.get("scale_attn_weights", True)
    return from_hf(
        shared,
        attn_scale=None if plain else 1.0,
        extra=(("scale_by_layer", bool(hf.get("scale_attn_by_inverse_layer_idx", False))),),
        ffw_dim=hf.get("n_inner") or hf.get("intermediate_size") or 4 * shared["hidden_size"],
        norm_eps=hf.get("layer_norm_epsilon", hf.get("layer_norm_eps", 1e-5)),
        activation=hf.get("activation_function", "gelu_new"),
        rope=None,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


FAMILIES = (
    Family("GPT-2", ("GPT2LMHeadModel",), gpt2_config, GPT2, gguf=("gpt2",), ignore=(r"\.attn\.(masked_)?bias$",)),
)
