"""Kimi Linear (Kimi Team 2025, arXiv:2510.26692): delta attention with a decay a channel in most layers, latent attention without
positions in the others, DeepSeek-V3's mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from models.config import MLAConfig, ModelConfig, MoEConfig, from_hf, layer_kinds
from models.decoder import Decoder
from models.family import Family
from models.layers import Build, GatedMLP, Layer
from models.layers.kda import KimiDeltaAttention
from models.layers.mla import LatentAttention
from models.layers.moe import MoE
from models.mixers import KDA
from models.recipes import Recipes, under


class KimiMoE(MoE):
    """With the names of Mixtral's experts."""

    def recipes(self, name: str) -> Recipes:
        recipes = {path: recipe for path, recipe in super().recipes(name).items() if not path.startswith("experts.")}
        return recipes | under("experts", self.experts.recipes(f"{name}.experts", ("w1", "w3", "w2")))


class KimiLayer(Layer):
    def make_attention(self, config: ModelConfig, index: int, build: Build) -> Any:
        mixer = config.mixers[index]
        return (
            KimiDeltaAttention(config, mixer, build)
            if isinstance(mixer, KDA)
            else LatentAttention(config, index, build)
        )

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> MoE | GatedMLP:
        sparse = config.moe is not None and config.moe.layers[index]
        return KimiMoE(config, build, shared_name="shared_experts") if sparse else GatedMLP(config, build)


class KimiSparseLayer(KimiLayer):
    names: ClassVar[dict[str, str]] = Layer.names | {"mlp": "block_sparse_moe"}


def build(config: ModelConfig, build: Build) -> Decoder:
    def layer(config: ModelConfig, index: int, build: Build) -> KimiLayer:
        sparse = config.moe is not None and config.moe.layers[index]
        return (KimiSparseLayer if sparse else KimiLayer)(config, index, build)

    return Decoder(config, build, layer)


def kimi_linear_config(hf: Mapping[str, Any]) -> ModelConfig:
    layers, linear = hf["num_hidden_layers"], hf.get("linear_attn_config") or {}
    kinds = hf.get("layer_types")
    if kinds is None and "kda_layers" in linear:  # counted from 1
        kinds = [
            "linear_attention" if index + 1 in linear["kda_layers"] else "full_attention" for index in range(layers)
        ]
    elif kinds is None:
        kinds = ["full_attention" if index and index % 4 == 0 else "linear_attention" for index in range(layers)]
    kinds = layer_kinds(kinds, layers, ("linear_attention", "full_attention"))
    first = hf.get("first_k_dense_replace", 1)
    blocks = hf.get("mlp_layer_types") or ["dense" if index < first else "sparse" for index in range(layers)]
    blocks = layer_kinds(blocks, layers, ("dense", "sparse"), "mlp_layer_types")
    kda = KDA(
        linear.get("num_heads", hf["linear_num_heads"]),
        linear.get("head_dim", hf["linear_head_dim"]),
        linear.get("short_conv_kernel_size", hf["linear_conv_kernel_dim"]),
        hf.get("hidden_act", "silu"),
    )
    moe = MoEConfig(
        hf["num_experts"],
        hf["num_experts_per_token"],
        hf["moe_intermediate_size"],
        tuple(kind == "sparse" for kind in blocks),
        scoring="sigmoid",
        normalize=bool(hf.get("moe_renormalize", True)),
        scale=float(hf.get("routed_scaling_factor", 1.0)),
        bias=True,
        groups=hf.get("num_expert_group") or 1,
        groups_kept=hf.get("topk_group") or 1,
        group_score="top2",
        shared_ffw_dim=hf["num_shared_experts"] * hf["moe_intermediate_size"],
    )
    mla = MLAConfig(
        hf.get("q_lora_rank"), hf["kv_lora_rank"], hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"]
    )
    bias = bool(hf.get("attention_bias", False))
    return from_hf(
        hf,
        max_positions=hf["model_max_length"],
        head_dim=mla.nope_dim + mla.rope_dim,
        num_kv_heads=hf["num_attention_heads"],
        rope=None,
        qkv_bias=bias,
        out_bias=bias,
        mixers=tuple(kda if kind == "linear_attention" else None for kind in kinds),
        moe=moe,
        mla=mla,
    )


FAMILIES = (Family("Kimi Linear", ("KimiLinearForCausalLM",), kimi_linear_config, build, gguf=("kimi-linear",)),)
