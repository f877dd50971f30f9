"""DeepSeek-V2 and V3 (arXiv:2405.04434, arXiv:2412.19437): latent attention, many routed experts and shared ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import MLAConfig, ModelConfig, MoEConfig, from_hf, rope_from_hf
from models.decoder import Decoder
from models.family import Family
from models.heads.mtp import MTP, behind
from models.layers import Build, GatedMLP, Layer
from models.layers.mla import LatentAttention
from models.layers.moe import MoE


class DeepseekLayer(Layer):
    def make_attention(self, config: ModelConfig, index: int, build: Build) -> LatentAttention:
        return LatentAttention(config, index, build)

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> MoE | GatedMLP:
        sparse = config.moe is not None and config.moe.layers[index]
        return MoE(config, build, shared_name="shared_experts") if sparse else GatedMLP(config, build)


def build(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, DeepseekLayer)


def latent_config(
    hf: Mapping[str, Any], mlp_bias: bool = False, part: float | None = None, **routing: Any
) -> ModelConfig:
    """What all networks with latent attention and a mixture of this kind have in common.

    Args:
        mlp_bias: dense blocks and the shared expert have biases.
        part: as in `rope_from_hf`.
        routing: fields of `MoEConfig`.
    """
    layers = hf["num_hidden_layers"]
    first, step = hf.get("first_k_dense_replace", 0), hf.get("moe_layer_freq", 1)
    experts = hf.get("n_routed_experts") or hf.get("num_local_experts")
    moe = None
    if experts:
        moe = MoEConfig(
            num_experts=experts,
            experts_per_token=hf["num_experts_per_tok"],
            ffw_dim=hf["moe_intermediate_size"],
            layers=tuple(index >= first and index % step == 0 for index in range(layers)),
            scale=hf.get("routed_scaling_factor", 1.0),
            shared_ffw_dim=(hf.get("n_shared_experts") or 0) * hf["moe_intermediate_size"],
            **routing,
        )
    rope_dim = hf["qk_rope_head_dim"]
    mla = MLAConfig(hf.get("q_lora_rank"), hf["kv_lora_rank"], hf["qk_nope_head_dim"], rope_dim, hf["v_head_dim"])
    bias = bool(hf.get("attention_bias", False))
    return from_hf(
        hf,
        head_dim=hf["qk_nope_head_dim"] + rope_dim,
        num_kv_heads=hf["num_attention_heads"],
        rope=rope_from_hf(hf, rope_dim, part=part),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=mlp_bias,
        moe=moe,
        mla=mla,
        extra=(("rope_interleave", hf.get("rope_interleave", True)),),
    )


def deepseek_v2_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Files have V3's `norm_topk_prob` too; transformers' V2 looks past it, and all published ones say false."""
    grouped = hf.get("topk_method", "greedy") == "group_limited_greedy"
    return latent_config(
        hf,
        bool(hf.get("mlp_bias", False)),
        groups=(hf.get("n_group") or 1) if grouped else 1,
        groups_kept=(hf.get("topk_group") or 1) if grouped else 1,
    )


def deepseek_v3_config(hf: Mapping[str, Any]) -> ModelConfig:
    return latent_config(
        hf,
        scoring="sigmoid",
        normalize=bool(hf.get("norm_topk_prob", True)),
        bias=True,
        groups=hf.get("n_group", 8),
        groups_kept=hf.get("topk_group", 4),
        group_score="top2",
    )


def deepseek_v3_mtp(hf: Mapping[str, Any]) -> MTP:
    layers = hf["num_hidden_layers"]
    return MTP(deepseek_v3_config({**hf, "num_hidden_layers": layers + 1}), DeepseekLayer, behind(layers))


FAMILIES = (
    Family("DeepSeek-V2", ("DeepseekV2ForCausalLM",), deepseek_v2_config, build, gguf=("deepseek2",)),
    Family(
        "DeepSeek-V3, R1",
        ("DeepseekV3ForCausalLM",),
        deepseek_v3_config,
        build,
        gguf=("deepseek2 with sigmoid routing",),
        mtp=deepseek_v3_mtp,
    ),
)
