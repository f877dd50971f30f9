"""GLM-4.1V, 4.5V and 4.6V (Z.ai 2025, arXiv:2507.01006): GLM-4, whose blocks have a norm before and behind them, or the mixture of
GLM-4.5, with positions of three numbers, beside a tower that reads images of any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from models.api import Step
from models.config import ModelConfig, from_hf
from models.decoder import Decoder
from models.encoders.vision.glm import GlmVision, glm_vision
from models.families.gemma.gemma import GemmaLayer
from models.families.glm.glm4_moe import build as build_moe
from models.families.glm.glm4_moe import glm4_moe_config
from models.families.phi3 import Phi3MLP
from models.families.qwen.qwen_vl import VISUAL
from models.family import Family, Tower
from models.layers import Attention, Build, heads_of
from ops.paged_attention import attend
from ops.rope import rope


class GlmAttention(Attention):
    """Pairs of neighbouring channels turn."""

    def attend(self, qkv_TKgh: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any]:
        q_TKGh, k_TKh, v_TKh = heads_of(qkv_TKgh)
        assert self.rotary is not None
        q_TKGh, k_TKh = (rope(x, step.positions_T, *self.rotary, interleaved=True) for x in (q_TKGh, k_TKh))
        return attend(q_TKGh, k_TKh, v_TKh, kv, step.attention, **self.scoring)


class GlmLayer(GemmaLayer):
    names: ClassVar[dict[str, str]] = {
        "attn_norm": "input_layernorm", "attn": "self_attn", "attn_out_norm": "post_self_attn_layernorm",
        "mlp_norm": "post_attention_layernorm", "mlp": "mlp", "mlp_out_norm": "post_mlp_layernorm",
    }  # fmt: skip

    def make_attention(self, config: ModelConfig, index: int, build: Build) -> GlmAttention:
        return GlmAttention(config, index, build)

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> Phi3MLP:
        return Phi3MLP(config, build)


def build(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, GlmLayer) if config.moe is None else build_moe(config, build)


def glm_config(hf: Mapping[str, Any]) -> ModelConfig:
    """GLM-4.6V is either; its text's `model_type` says which."""
    if hf.get("n_routed_experts"):
        return glm4_moe_config(hf)
    return from_hf(hf, partial=True, qkv_bias=True)


FAMILIES = (
    Family(
        "GLM-4.1V, 4.6V Flash",
        ("Glm4vForConditionalGeneration", "Glm46VForConditionalGeneration"),
        glm_config,
        build,
        ignore=(VISUAL,),
        tower=Tower(glm_vision, GlmVision, VISUAL, videos=True),
    ),
    Family(
        "GLM-4.5V (MoE)",
        ("Glm4vMoeForConditionalGeneration",),
        glm_config,
        build,
        ignore=(VISUAL,),
        tower=Tower(glm_vision, GlmVision, VISUAL, videos=True),
    ),
)
