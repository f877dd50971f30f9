"""Gemma (arXiv:2403.08295): Llama with scaled embeddings. Gemma 2 (arXiv:2408.00118) and 3 (arXiv:2503.19786): a norm
before and after each block, local and global layers in turn, soft-capped scores and logits (2) or a norm over each head's q
and k (3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from models.api import Step
from models.config import ModelConfig, from_hf, rope_from_hf, windows_from_hf
from models.decoder import Decoder
from models.encoders.vision.gemma import Gemma3, gemma3_vision
from models.family import Family, Tower
from models.layers import Build, Layer

VISION = (r"^(model\.)?(vision_tower|multi_modal_projector|vision_model)\.",)


class GemmaLayer(Layer):
    """x + norm(attn(norm(x))), then x + norm(mlp(norm(x)))."""

    names: ClassVar[dict[str, str]] = {
        "attn_norm": "input_layernorm",
        "attn": "self_attn",
        "attn_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp": "mlp",
        "mlp_out_norm": "post_feedforward_layernorm",
    }

    def __init__(self, config: ModelConfig, index: int, build: Build):
        super().__init__(config, index, build)
        self.attn_out_norm = self.make_norm(config)
        self.mlp_out_norm = self.make_norm(config)

    def __call__(self, x_TD: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any, tuple[jax.Array, ...]]:
        attended_TD, kv = self.attn(self.attn_norm(x_TD), step, kv)
        x_TD = step.asked(x_TD + self.attn_out_norm(attended_TD))
        y_TD, visited = self.mlp(self.mlp_norm(x_TD), step)
        return x_TD + self.mlp_out_norm(y_TD), kv, visited


def build(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, GemmaLayer)


def _refuse_both_ways(hf: Mapping[str, Any]) -> None:
    """Attention to what comes after a token is no decoder's.

    Raises:
        ValueError: the file asks for it.
    """
    if hf.get("use_bidirectional_attention"):
        raise ValueError("config.json: use_bidirectional_attention is set; this is no model that generates.")


def gemma_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Published files say "gelu" where the tanh approximation was trained."""
    _refuse_both_ways(hf)
    told = hf.get("hidden_activation") or hf.get("hidden_act")
    return from_hf(
        hf,
        head_dim=hf.get("head_dim", 256),
        activation=told if told not in (None, "gelu") else "gelu_pytorch_tanh",
        norm_offset=True,
        embed_scale=hf["hidden_size"] ** 0.5,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        qkv_bias=bool(hf.get("attention_bias", False)),
        out_bias=bool(hf.get("attention_bias", False)),
    )


def _shared(hf: Mapping[str, Any], every: int) -> dict[str, Any]:
    """What both have; one layer in `every` is global (the last of each run)."""
    _refuse_both_ways(hf)
    layers, window = hf["num_hidden_layers"], hf.get("sliding_window", 4096)
    kinds = hf.get("layer_types") or [
        "full_attention" if (index + 1) % every == 0 else "sliding_attention" for index in range(layers)
    ]
    return {
        "head_dim": hf.get("head_dim", 256),
        "activation": hf.get("hidden_activation") or "gelu_pytorch_tanh",
        "norm_offset": True,
        "embed_scale": hf["hidden_size"] ** 0.5,
        "attn_scale": hf.get("query_pre_attn_scalar", 256) ** -0.5,
        "windows": windows_from_hf({"sliding_window": window, "layer_types": kinds}, layers),
        "qkv_bias": bool(hf.get("attention_bias", False)),
        "out_bias": bool(hf.get("attention_bias", False)),
        "logits_softcap": hf.get("final_logit_softcapping"),
        "tie_embeddings": hf.get("tie_word_embeddings", True),
    }


def gemma2_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Only these bound the scores: Gemma 3's files may have the field too, and its networks look past it."""
    hf = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} | dict(hf)
    return from_hf(hf, attn_softcap=hf["attn_logit_softcapping"], **_shared(hf, 2))


def gemma3_config(hf: Mapping[str, Any]) -> ModelConfig:
    # Fields that published config.json files leave out have the values of Gemma3TextConfig.
    defaults = {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 262208,
        "rope_theta": 1e6,
        "max_position_embeddings": 131072,
    }
    hf = defaults | dict(hf)
    every = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    shared = _shared(hf, every)
    dim = shared["head_dim"]
    local = {name: value for name, value in hf.items() if name != "rope_scaling"}
    if "sliding_attention" not in (hf.get("rope_parameters") or {}):
        local = {"rope_theta": hf.get("rope_local_base_freq", 10000.0)}
    return from_hf(
        hf,
        qk_norm="head",
        rope=rope_from_hf(hf, dim, "full_attention"),
        local_rope=rope_from_hf(local, dim, "sliding_attention"),
        **shared,
    )


FAMILIES = (
    Family("Gemma", ("GemmaForCausalLM",), gemma_config, Decoder, gguf=("gemma",)),
    Family("Gemma 2", ("Gemma2ForCausalLM",), gemma2_config, build, gguf=("gemma2",)),
    Family(
        "Gemma 3 (text)",
        ("Gemma3ForCausalLM",),
        gemma3_config,
        build,
        gguf=("gemma3",),
        ignore=VISION,
    ),
    Family(
        "Gemma 3",
        ("Gemma3ForConditionalGeneration",),
        gemma3_config,
        build,
        ignore=VISION,
        tower=Tower(gemma3_vision, Gemma3, VISION[0]),
    ),
)
