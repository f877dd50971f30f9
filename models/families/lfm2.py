"""LFM2 (Liquid AI 2025), dense and with experts: gated short convolutions between some layers of attention with norms over each
head's q and k."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from models.config import ModelConfig, MoEConfig, from_hf, layer_kinds
from models.decoder import Decoder
from models.family import Family
from models.layers import Build, GatedMLP, Layer, child_recipes
from models.layers.attention import HeadNormAttention
from models.layers.mixing import mixer_of
from models.layers.moe import MoE
from models.mixers import ShortConv
from models.recipes import Recipes, deal, one, pieces, under


class Lfm2Attention(HeadNormAttention):
    def recipes(self, name: str) -> Recipes:
        recipes = {path: recipe for path, recipe in super().recipes(name).items() if path == "qkv.weight"}
        children = {"q_norm": "q_layernorm", "k_norm": "k_layernorm", "out": "out_proj"}
        return recipes | child_recipes(self, children, name)


class Lfm2MLP(GatedMLP):
    def recipes(self, name: str) -> Recipes:
        D, F = self.down.weight.shape
        weights = pieces([f"{name}.w1.weight", f"{name}.w3.weight"], (F, D), (F, D))
        return {"gate_up.weight": deal(self.shards, *weights)} | under("down", self.down.recipes(f"{name}.w2"))


class Lfm2MoE(MoE):
    def recipes(self, name: str) -> Recipes:
        recipes = under("router", self.router.recipes(f"{name}.gate"))
        if self.bias is not None:
            recipes["bias"] = one(f"{name}.expert_bias", *self.bias.shape)
        return recipes | under("experts", self.experts.recipes(f"{name}.experts", ("w1", "w3", "w2")))


class Lfm2Layer(Layer):
    names: ClassVar[dict[str, str]] = {
        "attn_norm": "operator_norm",
        "attn": "self_attn",
        "mlp_norm": "ffn_norm",
        "mlp": "feed_forward",
    }

    def make_attention(self, config: ModelConfig, index: int, build: Build) -> Any:
        return Lfm2Attention(config, index, build) if config.mixers[index] is None else mixer_of(config, index, build)

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> GatedMLP | MoE:
        sparse = config.moe is not None and config.moe.layers[index]
        return Lfm2MoE(config, build) if sparse else Lfm2MLP(config, build)


class Lfm2ConvLayer(Lfm2Layer):
    names: ClassVar[dict[str, str]] = Lfm2Layer.names | {"attn": "conv"}


class Lfm2(Decoder):
    names: ClassVar[dict[str, str]] = Decoder.names | {"norm": "model.embedding_norm"}


def build(config: ModelConfig, build: Build) -> Decoder:
    def layer(config: ModelConfig, index: int, build: Build) -> Lfm2Layer:
        return (Lfm2Layer if config.mixers[index] is None else Lfm2ConvLayer)(config, index, build)

    return Lfm2(config, build, layer)


def lfm2_config(hf: Mapping[str, Any]) -> ModelConfig:
    layers, kinds, full = hf["num_hidden_layers"], hf.get("layer_types"), hf.get("full_attn_idxs")
    if kinds is None:
        full = range(layers) if full is None else full
        kinds = ["full_attention" if index in full else "conv" for index in range(layers)]
    kinds = layer_kinds(kinds, layers, ("full_attention", "conv"))
    conv = ShortConv(hf["conv_L_cache"], bool(hf.get("conv_bias", False)))
    ffw = hf.get("block_ff_dim") or hf["intermediate_size"]
    if hf.get("block_auto_adjust_ff_dim", True):
        ffw, multiple = int(2 * ffw / 3), hf["block_multiple_of"]
        if hf.get("block_ffn_dim_multiplier") is not None:
            ffw = int(hf["block_ffn_dim_multiplier"] * ffw)
            ffw = -(-ffw // multiple) * multiple
    tied = hf.get("tie_embedding", hf.get("tie_word_embeddings", True))
    return from_hf(
        {**hf, "rms_norm_eps": hf["norm_eps"], "intermediate_size": ffw, "tie_word_embeddings": tied},
        qk_norm="head",
        activation="silu",
        mixers=tuple(conv if kind == "conv" else None for kind in kinds),
    )


def lfm2_moe_config(hf: Mapping[str, Any]) -> ModelConfig:
    layers = hf["num_hidden_layers"]
    moe = MoEConfig(
        hf["num_experts"],
        hf["num_experts_per_tok"],
        hf["moe_intermediate_size"],
        tuple(index >= hf["num_dense_layers"] for index in range(layers)),
        scoring="sigmoid",
        normalize=bool(hf.get("norm_topk_prob", True)),
        scale=float(hf.get("routed_scaling_factor", 1.0)),
        bias=bool(hf.get("use_expert_bias", True)),
    )
    return dataclasses.replace(lfm2_config({**hf, "block_auto_adjust_ff_dim": False}), moe=moe)


FAMILIES = (
    Family("LFM2", ("Lfm2ForCausalLM",), lfm2_config, build, gguf=("lfm2",)),
    Family("LFM2 MoE", ("Lfm2MoeForCausalLM",), lfm2_moe_config, build, gguf=("lfm2moe",)),
)
