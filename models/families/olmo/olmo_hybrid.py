"""OLMo Hybrid (Team OLMo 2026): Gated DeltaNet behind a norm in three layers of four, and in the fourth OLMo 2's layer, whose norms
are behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from models.config import ModelConfig, from_hf, layer_kinds
from models.decoder import Decoder
from models.families.olmo.olmo2 import Olmo2Layer
from models.family import Family
from models.layers import Build, Layer
from models.layers.delta_net import GatedDeltaNet, rate_of, taps_of
from models.layers.norms import RMSNorm
from models.mixers import DeltaNet
from models.recipes import Computed, Recipe, Recipes, deal, one, pieces, under

HEAD_NORM_EPS = 1e-5
"""Of the norm over a head; no checkpoint says another."""


class OlmoDeltaNet(GatedDeltaNet):
    """Every projection, and the taps of q, k and v, in a tensor of its own."""

    def __init__(self, config: ModelConfig, mixer: DeltaNet, build: Build):
        super().__init__(config, mixer, build)
        self.reach = 2.0 if config.get("turns_over") else 1.0
        self.norm = RMSNorm(mixer.value_dim, HEAD_NORM_EPS)

    def recipes(self, name: str) -> Recipes:
        m, D = self.mixer, self.out.weight.shape[0]
        K, H = m.key_heads, m.value_heads
        widths = (K * m.key_dim, K * m.key_dim, H * m.value_dim)
        inputs = pieces([f"{name}.{part}_proj.weight" for part in "qkvg"], *((n, D) for n in (*widths, widths[-1])))
        taps = pieces([f"{name}.{part}_conv1d.weight" for part in "qkv"], *((n, 1, m.conv_width) for n in widths))
        recipes: dict[str, Recipe] = {
            "inputs.weight": deal(K, *inputs),
            "gates.weight": deal(K, *pieces([f"{name}.{part}_proj.weight" for part in "ba"], (H, D), (H, D))),
            "kernel": Computed((deal(K, *taps),), taps_of),
            "rate": one(f"{name}.A_log", H, assemble=rate_of),
            "dt_bias": one(f"{name}.dt_bias", H),
        }
        recipes |= under("norm", self.norm.recipes(f"{name}.o_norm"))
        return recipes | under("out", self.out.recipes(f"{name}.o_proj"))


class OlmoDeltaLayer(Layer):
    names: ClassVar[dict[str, str]] = Layer.names | {"attn": "linear_attn"}

    def make_attention(self, config: ModelConfig, index: int, build: Build) -> Any:
        mixer = config.mixers[index]
        assert isinstance(mixer, DeltaNet)
        return OlmoDeltaNet(config, mixer, build)


def build(config: ModelConfig, build: Build) -> Decoder:
    def layer(config: ModelConfig, index: int, build: Build) -> Layer:
        return (Olmo2Layer if config.mixers[index] is None else OlmoDeltaLayer)(config, index, build)

    return Decoder(config, build, layer)


def olmo_hybrid_config(hf: Mapping[str, Any]) -> ModelConfig:
    layers, heads = hf["num_hidden_layers"], hf["num_attention_heads"]
    kinds = hf.get("layer_types") or [
        "full_attention" if index % 4 == 3 else "linear_attention" for index in range(layers)
    ]
    kinds = layer_kinds(kinds, layers, ("full_attention", "linear_attention"))
    keys = hf.get("linear_num_key_heads") or heads
    key_dim = hf.get("linear_key_head_dim") or int(0.75 * hf["hidden_size"] / keys)
    delta = DeltaNet(
        keys,
        key_dim,
        hf.get("linear_num_value_heads") or heads,
        hf.get("linear_value_head_dim") or 2 * key_dim,
        hf.get("linear_conv_kernel_dim", 4),
        hf.get("hidden_act", "silu"),
    )
    bias = bool(hf.get("attention_bias", False))
    theta = (hf.get("rope_parameters") or hf).get("rope_theta")
    rotation: dict[str, Any] = {"rope": None} if theta is None else {}
    return from_hf(
        hf,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="full",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        mixers=tuple(delta if kind == "linear_attention" else None for kind in kinds),
        extra=(("turns_over", bool(hf.get("linear_allow_neg_eigval", True))),),
        **rotation,
    )


FAMILIES = (Family("OLMo Hybrid", ("OlmoHybridForCausalLM",), olmo_hybrid_config, build),)
