"""GLM-4.5, 4.6 and 4.7 (Z.ai 2025, arXiv:2508.06471): DeepSeek-V3's mixture behind grouped queries, half of a head rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, MoEConfig, from_hf
from models.decoder import Decoder
from models.family import Family
from models.heads.mtp import MTP, behind
from models.layers import Build, GatedMLP, Layer
from models.layers.moe import MoE


class Glm4MoELayer(Layer):
    """A mixture behind the first layers, which are dense."""

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> MoE | GatedMLP:
        assert config.moe is not None
        sparse = config.moe.layers[index]
        return MoE(config, build, shared_name="shared_experts") if sparse else GatedMLP(config, build)


def build(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, Glm4MoELayer)


def glm4_moe_config(hf: Mapping[str, Any]) -> ModelConfig:
    layers, first = hf["num_hidden_layers"], hf.get("first_k_dense_replace", 1)
    moe = MoEConfig(
        num_experts=hf["n_routed_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        ffw_dim=hf["moe_intermediate_size"],
        layers=tuple(index >= first for index in range(layers)),
        scoring="sigmoid",
        normalize=bool(hf.get("norm_topk_prob", True)),
        scale=hf.get("routed_scaling_factor", 1.0),
        bias=True,
        groups=hf.get("n_group") or 1,
        groups_kept=hf.get("topk_group") or 1,
        group_score="top2",
        shared_ffw_dim=(hf.get("n_shared_experts") or 0) * hf["moe_intermediate_size"],
    )
    norms = "head" if hf.get("use_qk_norm", False) else "none"
    bias = bool(hf.get("attention_bias", False))
    return from_hf(hf, partial=True, moe=moe, qk_norm=norms, qkv_bias=bias)


def glm4_moe_mtp(hf: Mapping[str, Any]) -> MTP:
    layers = hf["num_hidden_layers"]
    return MTP(glm4_moe_config({**hf, "num_hidden_layers": layers + 1}), Glm4MoELayer, behind(layers))


FAMILIES = (
    Family(
        "GLM-4.5, 4.6, 4.7 (MoE)",
        ("Glm4MoeForCausalLM",),
        glm4_moe_config,
        build,
        gguf=("glm4moe",),
        mtp=glm4_moe_mtp,
    ),
)
