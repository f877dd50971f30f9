"""Qwen3-Next (Qwen Team 2025) and Qwen3.5, 3.6 and 3.8: Gated DeltaNet in three layers of four, gated attention in the
fourth, dense or with many small experts and a gated shared one; 3.5 and later beside a tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from models.config import ModelConfig, from_hf, layer_kinds
from models.decoder import Decoder
from models.encoders.vision.qwen3 import Qwen3Vision, qwen3_vision
from models.families.qwen.qwen_moe import qwen_moe
from models.family import Family, Tower
from models.heads import mtp
from models.heads.mtp import MTP
from models.layers import Build, GatedMLP, Layer
from models.layers.mixing import mixer_of
from models.layers.moe import MoE
from models.mixers import DeltaNet

BESIDE = (r"^(model\.)?visual\.", r"^mtp\.")
"""What reads images, and heads that draft."""


class QwenHybridLayer(Layer):
    def make_attention(self, config: ModelConfig, index: int, build: Build) -> Any:
        return mixer_of(config, index, build, **({"fused": True} if config.get("fused") else {}))

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> MoE | GatedMLP:
        sparse = config.moe is not None and config.moe.layers[index]
        return MoE(config, build) if sparse else GatedMLP(config, build)


class QwenDeltaLayer(QwenHybridLayer):
    names: ClassVar[dict[str, str]] = Layer.names | {"attn": "linear_attn"}


def build(config: ModelConfig, build: Build) -> Decoder:
    def layer(config: ModelConfig, index: int, build: Build) -> Layer:
        return (QwenHybridLayer if config.mixers[index] is None else QwenDeltaLayer)(config, index, build)

    return Decoder(config, build, layer)


def _hybrid(hf: Mapping[str, Any], **more: Any) -> ModelConfig:
    layers, every = hf["num_hidden_layers"], hf.get("full_attention_interval") or 4
    kinds = hf.get("layer_types") or [
        "linear_attention" if (index + 1) % every else "full_attention" for index in range(layers)
    ]
    kinds = layer_kinds(kinds, layers, ("full_attention", "linear_attention"))
    delta = DeltaNet(
        hf["linear_num_key_heads"],
        hf["linear_key_head_dim"],
        hf["linear_num_value_heads"],
        hf["linear_value_head_dim"],
        hf.get("linear_conv_kernel_dim", 4),
        hf.get("hidden_act", "silu"),
    )
    bias = bool(hf.get("attention_bias", False))
    return from_hf(
        hf,
        partial=True,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        norm_offset=True,
        attn_gate=True,
        mixers=tuple(delta if kind == "linear_attention" else None for kind in kinds),
        **more,
    )


def qwen3_next_config(hf: Mapping[str, Any]) -> ModelConfig:
    moe = None
    if hf.get("num_experts"):
        moe = qwen_moe(hf, shared_ffw_dim=hf["shared_expert_intermediate_size"], shared_gate=True)
    return _hybrid(hf, moe=moe, extra=(("fused", bool(hf.get("fused_inputs", True))),))  # GGUF takes them apart


def qwen3_5_config(hf: Mapping[str, Any]) -> ModelConfig:
    return _hybrid(hf)


def qwen3_5_moe_config(hf: Mapping[str, Any]) -> ModelConfig:
    hf = {**hf, "norm_topk_prob": True}
    return _hybrid(hf, moe=qwen_moe(hf, shared_ffw_dim=hf["shared_expert_intermediate_size"], shared_gate=True))


def _mtp(read: Callable[[Mapping[str, Any]], ModelConfig]) -> Callable[[Mapping[str, Any]], MTP]:
    """The head: a layer with attention, whatever the model's own."""

    def made(hf: Mapping[str, Any]) -> MTP:
        layers, every = hf["num_hidden_layers"], hf.get("full_attention_interval") or 4
        kinds = hf.get("layer_types") or [
            "linear_attention" if (index + 1) % every else "full_attention" for index in range(layers)
        ]
        more = {"num_hidden_layers": layers + 1, "layer_types": [*kinds[:layers], "full_attention"]}
        return MTP(read({**hf, **more}), QwenHybridLayer, mtp.BESIDE)

    return made


TOWER = Tower(qwen3_vision, Qwen3Vision, BESIDE[0], videos=True)

FAMILIES = (
    Family(
        "Qwen3-Next",
        ("Qwen3NextForCausalLM",),
        qwen3_next_config,
        build,
        gguf=("qwen3next",),
        ignore=BESIDE,
        mtp=_mtp(qwen3_next_config),
    ),
    Family(
        "Qwen3.5, 3.6, 3.8",
        ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
        qwen3_5_config,
        build,
        gguf=("qwen35",),
        ignore=BESIDE,
        mtp=_mtp(qwen3_5_config),
        tower=TOWER,
    ),
    Family(
        "Qwen3.5, 3.6 MoE",
        ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
        qwen3_5_moe_config,
        build,
        gguf=("qwen35moe",),
        ignore=BESIDE,
        mtp=_mtp(qwen3_5_moe_config),
        tower=TOWER,
    ),
)
