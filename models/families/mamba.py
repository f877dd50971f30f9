"""Mamba (arXiv:2312.00752), Falcon Mamba (TII 2024, arXiv:2410.05355) and Mamba-2 (arXiv:2405.21060): layers of one mixer each, no
attention at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import nnx

from models.api import Step
from models.config import ModelConfig, need
from models.decoder import Decoder
from models.family import Family
from models.layers import Build, RMSNorm, child_recipes
from models.layers.mixing import mixer_of
from models.mixers import Mamba1, Mamba2, Mixer
from models.recipes import Recipes


class MambaLayer(nnx.Module):
    """x + mixer(norm(x))."""

    def __init__(self, config: ModelConfig, index: int, build: Build):
        self.norm = RMSNorm(config.embed_dim, config.norm_eps)
        self.attn = mixer_of(config, index, build)

    def __call__(self, x_TD: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any, tuple[jax.Array, ...]]:
        x_TD, kv = self.attn(x_TD, step, kv, norm=self.norm, residual_TD=x_TD)
        return x_TD, kv, ()

    def recipes(self, name: str) -> Recipes:
        return child_recipes(self, {"norm": "norm", "attn": "mixer"}, name)


class Mamba(Decoder):
    names: ClassVar[dict[str, str]] = {"embed": "model.embeddings", "norm": "model.norm_f"}


def build(config: ModelConfig, build: Build) -> Mamba:
    return Mamba(config, build, MambaLayer)


def _config(hf: Mapping[str, Any], mixer: Mixer) -> ModelConfig:
    layers = need(hf, "num_hidden_layers")
    return ModelConfig(
        architecture=hf["architectures"][0],
        vocab_size=need(hf, "vocab_size"),
        num_layers=layers,
        embed_dim=need(hf, "hidden_size"),
        ffw_dim=0,
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
        # No position is ever told apart from another: what a server takes by default is a choice, not a limit.
        max_positions=hf.get("max_position_embeddings") or 8192,
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        mixers=(mixer,) * layers,
    )


def mamba_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Mamba, and Falcon Mamba, which has norms without scales."""
    embed, rank = need(hf, "hidden_size"), hf.get("time_step_rank", "auto")
    mixer = Mamba1(
        int(hf.get("intermediate_size") or hf.get("expand", 2) * embed),
        hf.get("state_size", 16),
        math.ceil(embed / 16) if rank == "auto" else rank,
        hf.get("conv_kernel", 4),
        conv_bias=bool(hf.get("use_conv_bias", True)),
        bias=bool(hf.get("use_bias", False)),
        norms="plain" if hf["architectures"][0].startswith("FalconMamba") else "",
        norm_eps=hf.get("mixer_rms_eps", 1e-6),
        activation=hf.get("hidden_act", "silu"),
    )
    return _config({"tie_word_embeddings": True, **hf}, mixer)


def mamba2_config(hf: Mapping[str, Any]) -> ModelConfig:
    groups, (low, high) = hf.get("n_groups", 8), hf.get("time_step_limit") or (0.0, float("inf"))
    mixer = Mamba2(
        hf.get("num_heads", 128),
        hf.get("head_dim", 64),
        hf.get("state_size", 128),
        groups,
        hf.get("conv_kernel", 4),
        conv_bias=bool(hf.get("use_conv_bias", True)),
        bias=bool(hf.get("use_bias", False)),
        norm_groups=groups,
        dt_limits=(float(low), float(high)),
        activation=hf.get("hidden_act", "silu"),
    )
    return _config(hf, mixer)


FAMILIES = (
    Family("Mamba, Falcon Mamba", ("MambaForCausalLM", "FalconMambaForCausalLM"), mamba_config, build, gguf=("mamba",)),
    Family("Mamba-2", ("Mamba2ForCausalLM",), mamba2_config, build, gguf=("mamba2",)),
)
"""Of Mistral's Codestral Mamba too, which is Mamba-2."""
