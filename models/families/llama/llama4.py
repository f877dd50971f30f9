"""Llama 4 (Meta 2025): layers that rotate and attend within chunks, and layers without rotation that see everything;
one routed expert a token whose input (not output) the router scales, beside a shared one.

Attention within chunks of `attention_chunk_size` (8192) positions is full attention up to that length: where no longer context
is served, kernels without chunks do it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from models.api import Step
from models.config import ModelConfig, MoEConfig, from_hf, layer_kinds
from models.decoder import Decoder
from models.encoders.vision.llama4 import Llama4Vision, llama4_vision
from models.family import Family, Tower
from models.layers import Attention, Build, GatedMLP, Layer, heads_of
from models.layers.moe import Experts, MoE
from models.recipes import Piece, Recipes, deal, one, split, under
from ops.norm import rms_norm
from ops.paged_attention import attend
from ops.rope import rope

VISION = (r"^(vision_model|multi_modal_projector)\.", r"^model\.(vision_model|multi_modal_projector)\.")


class Llama4Attention(Attention):
    """Rotated layers normalize q and k by their length; the others scale q with the position (arXiv:2501.19399)."""

    def __init__(self, config: ModelConfig, layer: int, build: Build):
        super().__init__(config, layer, build)
        self.eps, self.l2_norm = config.norm_eps, bool(config.get("use_qk_norm"))
        self.tuning = (config.get("floor_scale"), config.get("temperature"))
        chunk = config.get("chunk")
        self.chunk = chunk if chunk and config.get("chunked")[layer] and build.max_model_len > chunk else None
        self.window = self.chunk  # what is a chunk back is in another chunk

    def attend(self, qkv_TKgh: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any]:
        q_TKGh, k_TKh, v_TKh = heads_of(qkv_TKgh)
        if self.rotary is not None:
            inv_freq, factor = self.rotary
            q_TKGh = rope(q_TKGh, step.positions_T, inv_freq, factor, interleaved=True)
            k_TKh = rope(k_TKh, step.positions_T, inv_freq, factor, interleaved=True)
            if self.l2_norm:
                q_TKGh, k_TKh = rms_norm(q_TKGh, None, self.eps), rms_norm(k_TKh, None, self.eps)
        elif self.tuning[1]:
            floor_scale, strength = self.tuning
            steps_T = jnp.floor((step.positions_T.astype(jnp.float32) + 1.0) / floor_scale)
            q_TKGh = (q_TKGh * (jnp.log1p(steps_T) * strength + 1.0)[:, None, None, None]).astype(q_TKGh.dtype)
        return attend(q_TKGh, k_TKh, v_TKh, kv, step.attention, scale=self.scale, chunk=self.chunk)


class Llama4Experts(Experts):
    """Experts in one tensor, [E, in, gate then up]."""

    def recipes(self, name: str, sources: tuple[str, str, str] = ("", "", "")) -> Recipes:
        E, D, F = self.sizes

        both = Piece(f"{name}.gate_up_proj", (E, D, 2 * F), turned=True)
        return {
            "gate_up": deal(E * self.shards, *split(both, F, F)),
            "down": one(f"{name}.down_proj", E, F, D, turned=True),
        }


class Llama4MoE(MoE):
    """shared(x) + the sum over chosen experts of expert(x * sigmoid(router logit))."""

    def make_experts(self, config: ModelConfig, moe: MoEConfig, build: Build) -> Llama4Experts:
        return Llama4Experts(config, moe, build)

    def __call__(
        self, x_TD: jax.Array, step: Step, norm: Any = None, residual_TD: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        x_TD = x_TD if norm is None else norm(x_TD)
        T, k = x_TD.shape[0], self.moe.experts_per_token
        logits_TE = self.router(x_TD, out_dtype=jnp.float32, adapter_T=step.adapter_T)
        logits_Tk, ids_Tk = jax.lax.top_k(logits_TE, k)
        scaled_TkD = (x_TD[:, None] * jax.nn.sigmoid(logits_Tk)[..., None]).astype(x_TD.dtype)
        ids = ids_Tk.astype(jnp.int32).reshape(T * k, 1)
        own = None if step.adapter_T is None else jnp.repeat(step.adapter_T, k)
        routed = self.experts(scaled_TkD.reshape(T * k, -1), ids, jnp.ones((T * k, 1), jnp.float32), own)
        y_TD = routed.reshape(T, k, -1).sum(1)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD, step)[0]
        return (y_TD if residual_TD is None else y_TD + residual_TD), (ids,)

    def recipes(self, name: str) -> Recipes:
        assert self.shared is not None
        recipes = under("router", self.router.recipes(f"{name}.router"))
        recipes |= under("experts", self.experts.recipes(f"{name}.experts"))
        return recipes | under("shared", self.shared.recipes(f"{name}.shared_expert"))


class Llama4Layer(Layer):
    names: ClassVar[dict[str, str]] = Layer.names | {"mlp": "feed_forward"}

    def make_attention(self, config: ModelConfig, index: int, build: Build) -> Llama4Attention:
        return Llama4Attention(config, index, build)

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> Llama4MoE | GatedMLP:
        assert config.moe is not None
        return Llama4MoE(config, build) if config.moe.layers[index] else GatedMLP(config, build)


def build(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, Llama4Layer)


def llama4_config(hf: Mapping[str, Any]) -> ModelConfig:
    layers, every = hf["num_hidden_layers"], hf.get("no_rope_layer_interval", 4)
    step = hf.get("interleave_moe_layer_step", 1)
    rotates = hf.get("no_rope_layers") or [(index + 1) % every != 0 for index in range(layers)]
    kinds = hf.get("layer_types") or ["chunked_attention" if rotated else "full_attention" for rotated in rotates]
    chunked = [
        kind == "chunked_attention" for kind in layer_kinds(kinds, layers, ("chunked_attention", "full_attention"))
    ]
    sparse = hf.get("moe_layers")
    sparse = set(range(step - 1, layers, step)) if sparse is None else set(sparse)
    moe = MoEConfig(
        num_experts=hf.get("num_local_experts", 16),
        experts_per_token=hf.get("num_experts_per_tok", 1),
        ffw_dim=hf["intermediate_size"],
        layers=tuple(index in sparse for index in range(layers)),
        shared_ffw_dim=hf["intermediate_size"],
    )
    tuning, bias = hf.get("attn_temperature_tuning", True), bool(hf.get("attention_bias", False))
    return from_hf(
        hf,
        qkv_bias=bias,
        out_bias=bias,
        ffw_dim=hf.get("intermediate_size_mlp", 16384),
        max_positions=hf.get("max_position_embeddings", 131072),
        rope_layers=tuple(bool(rotated) for rotated in rotates),
        moe=moe,
        extra=(
            ("chunk", hf.get("attention_chunk_size")),
            ("chunked", tuple(chunked)),
            ("use_qk_norm", hf.get("use_qk_norm", True)),
            ("floor_scale", hf.get("floor_scale", 8192)),
            ("temperature", hf.get("attn_scale", 0.1) if tuning else None),
        ),
    )


FAMILIES = (
    Family(
        "Llama 4 (text)",
        ("Llama4ForCausalLM",),
        llama4_config,
        build,
        gguf=("llama4",),
        ignore=VISION,
    ),
    Family(
        "Llama 4",
        ("Llama4ForConditionalGeneration",),
        llama4_config,
        build,
        ignore=VISION,
        tower=Tower(llama4_vision, Llama4Vision, r"^(model\.)?(vision_model|multi_modal_projector)\."),
    ),
)
