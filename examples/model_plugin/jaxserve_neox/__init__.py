"""GPT-NeoX and Pythia (Black et al. 2022, arXiv:2204.06745; Biderman et al. 2023, arXiv:2304.01373): attention and
feed-forward side by side on one residual stream, and a quarter of each head rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from models.api import Step
from models.config import ModelConfig, from_hf, rope_from_hf
from models.decoder import Decoder
from models.family import Family
from models.layers import MLP, Attention, Build, Layer, LayerNorm
from models.recipes import Recipes, under


class NeoXAttention(Attention):
    """The checkpoint's rows are already laid out head by head as q, k, v: what `Attention` wants with G = 1."""

    def recipes(self, name: str) -> Recipes:
        qkv = under("qkv", self.qkv.recipes(f"{name}.query_key_value"))
        return qkv | under("out", self.out.recipes(f"{name}.dense"))


class NeoXLayer(Layer):
    """x + attn(norm(x)) + mlp(norm'(x)), or one after the other where the configuration says so."""

    names: ClassVar[dict[str, str]] = Layer.names | {"attn": "attention"}

    def __init__(self, config: ModelConfig, index: int, build: Build):
        super().__init__(config, index, build)
        self.parallel = bool(config.get("parallel"))

    def make_norm(self, config: ModelConfig) -> LayerNorm:
        return LayerNorm(config.embed_dim, config.norm_eps)

    def make_attention(self, config: ModelConfig, index: int, build: Build) -> NeoXAttention:
        return NeoXAttention(config, index, build)

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> MLP:
        return MLP(config, build, names=("dense_h_to_4h", "dense_4h_to_h"))

    def __call__(self, x_TD: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any, tuple[jax.Array, ...]]:
        attended_TD, kv = self.attn(x_TD, step, kv, norm=self.attn_norm, residual_TD=x_TD)
        mlp_input_TD = x_TD if self.parallel else attended_TD
        y_TD, visited = self.mlp(mlp_input_TD, step, norm=self.mlp_norm, residual_TD=attended_TD)
        return y_TD, kv, visited


class NeoX(Decoder):
    names: ClassVar[dict[str, str]] = {"embed": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm"}
    layer_name = "gpt_neox.layers"

    def __init__(self, config: ModelConfig, build: Build):
        super().__init__(config, build, NeoXLayer)

    def make_norm(self, config: ModelConfig) -> LayerNorm:
        return LayerNorm(config.embed_dim, config.norm_eps)

    def recipes(self) -> Recipes:
        recipes = super().recipes()
        if self.head is not None:
            recipes |= under("head", self.head.recipes("embed_out"))
        return recipes


def neox_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Reads config.json of GPT-NeoX."""
    head_dim = hf["hidden_size"] // hf["num_attention_heads"]
    fraction = hf.get("rotary_pct") or (hf.get("rope_parameters") or {}).get("partial_rotary_factor", 0.25)
    theta = hf.get("rotary_emb_base")
    bias = bool(hf.get("attention_bias", True))
    return from_hf(
        hf,
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        activation=hf.get("hidden_act", "gelu"),
        rope=rope_from_hf(hf, int(head_dim * fraction), theta=theta),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        extra=(("parallel", hf.get("use_parallel_residual", True)),),
    )


IGNORE = (r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",)
FAMILIES = (Family("GPT-NeoX, Pythia", ("GPTNeoXForCausalLM",), neox_config, NeoX, ignore=IGNORE),)
