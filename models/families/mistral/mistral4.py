"""Mistral 4 (Mistral AI 2026): DeepSeek-V2's latent attention and a mixture of experts in every layer; q grows far behind the
original context, as in Ministral 3."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models.api import Step
from models.config import ModelConfig, partial_rotary
from models.decoder import Decoder
from models.families.deepseek.deepseek import DeepseekLayer, latent_config
from models.family import Family
from models.layers import Build
from models.layers.mla import LatentAttention


class Mistral4Attention(LatentAttention):
    """q, of all its dimensions, grows with the logarithm of how many original contexts lie before it."""

    def __init__(self, config: ModelConfig, layer: int, build: Build):
        super().__init__(config, layer, build)
        self.beta, self.length = config.get("query_beta"), config.get("query_length")

    def query(self, compressed_TC: jax.Array, step: Step) -> jax.Array:
        q_THh = super().query(compressed_TC, step)
        passed_T = jnp.floor(step.positions_T.astype(jnp.float32) / self.length)
        return (q_THh * (1.0 + self.beta * jnp.log1p(passed_T))[:, None, None]).astype(q_THh.dtype)


class Mistral4Layer(DeepseekLayer):
    def make_attention(self, config: ModelConfig, index: int, build: Build) -> LatentAttention:
        # Within the original context nothing grows.
        grows = config.get("query_beta") and build.max_model_len > config.get("query_length")
        return (Mistral4Attention if grows else LatentAttention)(config, index, build)


def build(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, Mistral4Layer)


def mistral4_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The file says of a whole head which part has positions; what grows q stands beside the rotation.

    Raises:
        ValueError: another part than the dimensions that the file has for positions.
    """
    rotated, head = hf["qk_rope_head_dim"], hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]
    scaling = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    part = partial_rotary({**hf, "rope_parameters": scaling})
    if part != 1.0 and int(head * part) != rotated:
        raise ValueError(
            f"config.json: partial_rotary_factor is {part:g}, which of a head of {head} is not qk_rope_head_dim, {rotated}."
        )
    config = latent_config(
        hf,
        part=rotated / head,
        normalize=bool(hf.get("norm_topk_prob", True)),
        groups=hf.get("n_group") or 1,
        groups_kept=hf.get("topk_group") or 1,
        group_score="top2",
    )
    beta = scaling.get("llama_4_scaling_beta")
    if not beta or config.rope is None:
        return config
    growth = (("query_beta", float(beta)), ("query_length", config.rope.original_max_positions or config.max_positions))
    return dataclasses.replace(config, extra=(*config.extra, *growth))


FAMILIES = (Family("Mistral 4 (text)", ("Mistral4ForCausalLM",), mistral4_config, build, gguf=("mistral4",)),)
