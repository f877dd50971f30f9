"""Jamba (AI21 2024, arXiv:2403.19887): Mamba layers with some attention without positions, every other layer a mixture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from models.config import ModelConfig, MoEConfig, from_hf
from models.decoder import Decoder
from models.family import Family
from models.layers import Build, GatedMLP, Layer
from models.layers.mixing import mixer_of
from models.layers.moe import MoE
from models.mixers import Mamba1
from models.recipes import Recipes, under


class JambaMoE(MoE):
    """A mixture whose router has another name."""

    def recipes(self, name: str) -> Recipes:
        return under("router", self.router.recipes(f"{name}.router")) | under(
            "experts", self.experts.recipes(f"{name}.experts")
        )


class JambaLayer(Layer):
    names: ClassVar[dict[str, str]] = {
        "attn_norm": "input_layernorm",
        "attn": "self_attn",
        "mlp_norm": "pre_ff_layernorm",
        "mlp": "feed_forward",
    }

    def __init__(self, config: ModelConfig, index: int, build: Build):
        self.mixture = config.moe is not None and config.moe.layers[index]
        super().__init__(config, index, build)

    def make_attention(self, config: ModelConfig, index: int, build: Build) -> Any:
        return mixer_of(config, index, build)

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> Any:
        return JambaMoE(config, build) if self.mixture else GatedMLP(config, build)


class JambaMambaLayer(JambaLayer):
    names: ClassVar[dict[str, str]] = JambaLayer.names | {"attn": "mamba"}


class Jamba(Decoder):
    names: ClassVar[dict[str, str]] = {"embed": "model.embed_tokens", "norm": "model.final_layernorm"}


def build(config: ModelConfig, build: Build) -> Jamba:
    def layer(config: ModelConfig, index: int, build: Build) -> JambaLayer:
        return (JambaLayer if config.mixers[index] is None else JambaMambaLayer)(config, index, build)

    return Jamba(config, build, layer)


def jamba_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Files may say of each layer what it is; else periods and offsets do."""
    layers, embed, rank = hf["num_hidden_layers"], hf["hidden_size"], hf.get("mamba_dt_rank", "auto")
    mamba = Mamba1(
        hf.get("mamba_expand", 2) * embed,
        hf.get("mamba_d_state", 16),
        math.ceil(embed / 16) if rank == "auto" else rank,
        hf.get("mamba_d_conv", 4),
        conv_bias=bool(hf.get("mamba_conv_bias", True)),
        bias=bool(hf.get("mamba_proj_bias", False)),
        norms="scaled",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        activation=hf.get("hidden_act", "silu"),
    )
    period, offset = hf.get("attn_layer_period", 8), hf.get("attn_layer_offset", 4)
    experts, every, first = (
        hf.get("num_experts", 16),
        hf.get("expert_layer_period", 2),
        hf.get("expert_layer_offset", 1),
    )
    told, counts, moe = hf.get("layers_block_type"), hf.get("layers_num_experts"), None
    if experts > 1:
        at = tuple(counts[index] > 1 if counts else index % every == first for index in range(layers))
        moe = MoEConfig(experts, hf.get("num_experts_per_tok", 2), hf["intermediate_size"], at)
    return from_hf(
        hf,
        rope=None,
        moe=moe,
        mixers=tuple(
            None if (told[index] != "mamba" if told else index % period == offset) else mamba for index in range(layers)
        ),
    )


FAMILIES = (Family("Jamba", ("JambaForCausalLM",), jamba_config, build, gguf=("jamba",)),)
