"""Grouped-query attention over pages."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.api import Step
from models.config import ModelConfig
from models.layers.build import Build, child_recipes, weight
from models.layers.heads import PlacedHeads, Spread
from models.layers.linear import Linear
from models.layers.norms import Norm, RMSNorm
from models.layers.rotary import layer_frequencies
from models.recipes import Recipe, Recipes, deal, one, pieces, split, under
from ops.paged_attention import attend, attend_rope
from ops.paged_attention.batch import KVSpec
from ops.rope import rope
from sharding.rules import num_shards


class Attention(nnx.Module):
    """Grouped-query attention over pages.

    q, k and v are one projection, laid out per KV head: its G query heads, then its k, then its v. So cutting the rows
    into `model` pieces gives each device whole KV heads with the query heads that read them, and the product's result
    reshapes to [T, K, G + 2, h]. Where the axis does not divide K, heads are repeated or padded: see heads.py.
    """

    def __init__(self, config: ModelConfig, layer: int, build: Build):
        K, G, h, D = config.num_kv_heads, config.group, config.head_dim, config.embed_dim
        # A norm over all heads together cannot tell copies and padding from heads: there everyone has them all.
        shards = num_shards(build.mesh, "kv_heads", build.rules) if config.qk_norm != "full" else 1
        placed = PlacedHeads(K, G, h, shards)
        spread: dict[str, Any] = {}
        if placed.unchanged:
            axis = build.axis("kv_heads", K)
        else:
            axis = "kv_heads"
            spread = {part: {"spread": Spread(placed, part)} for part in ("qkv", "queries", "out", "sinks")}
        self.heads, self.placed = (K, G, h), (placed.kv_heads, placed.group, h)
        Kp, Gp, _ = self.placed
        qkv_axes, out_axes = (axis, "embed"), ("embed", axis)
        self.qkv = Linear(D, Kp * (Gp + 2) * h, build, qkv_axes, bias=config.qkv_bias, **spread.get("qkv", {}))
        self.out = Linear(Kp * Gp * h, D, build, out_axes, bias=config.out_bias, **spread.get("out", {}))
        rotary = config.layer_rope(layer)
        self.rope = None if rotary is None else (rotary, build.max_model_len)
        self.scale = h**-0.5 if config.attn_scale is None else config.attn_scale
        self.window, self.softcap = config.windows[layer], config.attn_softcap
        gate = Linear(D, Kp * Gp * h, build, qkv_axes, bias=config.qkv_bias, **spread.get("queries", {}))
        self.gate = gate if config.attn_gate else None
        sinks = spread.get("sinks", {})
        self.sinks = weight((Kp, Gp), jnp.float32, (axis, None), **sinks) if config.attn_sinks else None

    def __call__(
        self,
        x_TD: jax.Array,
        step: Step,
        kv: Any,
        norm: Norm | None = None,
        residual_TD: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """attention(norm(x)) + residual, and the layer's updated pages."""
        T, (K, G, h) = x_TD.shape[0], self.placed
        qkv_TKgh = self.qkv(x_TD, norm=norm, adapter_T=step.adapter_T).reshape(T, K, -1, h)
        out_TKGh, kv = self.attend(qkv_TKgh, step, kv)
        out_TO = out_TKGh.reshape(T, K * G * h)
        if self.gate is not None:
            out_TO = out_TO * jax.nn.sigmoid(self.gate(x_TD, norm=norm, adapter_T=step.adapter_T))
        return self.out(out_TO, residual_TO=residual_TD, adapter_T=step.adapter_T), kv

    def attend(self, qkv_TKgh: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any]:
        """What happens between the projections: out_TKGh, and the updated pages."""
        bias, (K, _, h) = self.qkv.bias_value(), self.placed
        bias_Kh = None if bias is None else bias.reshape(K, -1, h)[:, -2]
        return attend_rope(qkv_TKgh, step.positions_T, self.rotary, kv, step.attention, bias_Kh=bias_Kh, **self.scoring)

    @property
    def kv_spec(self) -> KVSpec:
        """What it keeps of each position."""
        K, _, h = self.placed
        return KVSpec(K, h, h, self.window)

    @property
    def rotary(self) -> tuple[Any, float] | None:
        """Frequencies and the factor on cosine and sine; None where nothing is rotated."""
        return None if self.rope is None else layer_frequencies(*self.rope)

    @property
    def scoring(self) -> dict[str, Any]:
        """What `ops.paged_attention.attend` is told of how scores are made."""
        sinks_KG = None if self.sinks is None else self.sinks[...]
        return {"scale": self.scale, "window": self.window, "softcap": self.softcap, "sinks_KG": sinks_KG}

    def recipes(self, name: str) -> Recipes:
        K, G, h = self.heads
        sources = [f"{name}.{part}_proj" for part in "qkv"]
        # With a gate, a head's rows of it are behind its own in q's projection.
        rows = (K * G * h * (1 if self.gate is None else 2), K * h, K * h)
        D = self.qkv.weight.shape[1]
        weights: tuple[Recipe, ...] = pieces([f"{source}.weight" for source in sources], *((n, D) for n in rows))
        biases: tuple[Recipe, ...] = pieces([f"{source}.bias" for source in sources], *((n,) for n in rows))
        recipes: Recipes = {}
        if self.gate is not None:
            (q, recipes["gate.weight"]), *kv = split(weights[0], h, h), *weights[1:]
            weights = (q, *kv)
            if self.gate.bias is not None:
                (q, recipes["gate.bias"]), *kv = split(biases[0], h, h), *biases[1:]
                biases = (q, *kv)
        recipes["qkv.weight"] = deal(K, *weights)
        if self.qkv.bias is not None:
            recipes["qkv.bias"] = deal(K, *biases)
        recipes |= under("out", self.out.recipes(f"{name}.o_proj"))
        if self.sinks is not None:
            recipes["sinks"] = one(f"{name}.sinks", K * G)
        return recipes


class HeadNormAttention(Attention):
    """Attention with an RMS norm over each head's q and k before they are rotated."""

    def __init__(self, config: ModelConfig, layer: int, build: Build):
        super().__init__(config, layer, build)
        self.q_norm = RMSNorm(self.q_width(config), config.norm_eps, config.norm_offset)
        self.k_norm = RMSNorm(self.k_width(config), config.norm_eps, config.norm_offset)

    def q_width(self, config: ModelConfig) -> int:
        """Channels that q's norm goes over."""
        return config.head_dim

    def k_width(self, config: ModelConfig) -> int:
        """Channels that k's norm goes over."""
        return config.head_dim

    def attend(self, qkv_TKgh: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any]:
        q_TKGh, k_TKh, v_TKh = heads_of(qkv_TKgh)
        q_TKGh, k_TKh = self.normed(q_TKGh, k_TKh)
        rotary = self.rotary
        if rotary is not None:
            q_TKGh, k_TKh = (rope(x, step.positions_T, *rotary) for x in (q_TKGh, k_TKh))
        return attend(q_TKGh, k_TKh, v_TKh, kv, step.attention, **self.scoring)

    def normed(self, q_TKGh: jax.Array, k_TKh: jax.Array) -> tuple[jax.Array, jax.Array]:
        """q and k, normalized."""
        return self.q_norm(q_TKGh), self.k_norm(k_TKh)

    def recipes(self, name: str) -> Recipes:
        return super().recipes(name) | child_recipes(self, {"q_norm": "q_norm", "k_norm": "k_norm"}, name)


class SharedAttention(HeadNormAttention):
    """Attention with queries alone: it reads the pages of a layer before it.

    Args:
        reads_of: that layer's index.
    """

    def __init__(self, config: ModelConfig, layer: int, build: Build, reads_of: int):
        super().__init__(dataclasses.replace(config, attn_gate=True), layer, build)
        assert self.gate is not None
        # As many rows, in the same places, as a gate has.
        self.qkv, self.gate, self.k_norm, self.reads_of = self.gate, None, None, reads_of

    @property
    def kv_spec(self) -> None:
        """Nothing of its own."""

    def attend(self, qkv_TKgh: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any]:
        q_TKGh = self.q_norm(qkv_TKgh)
        if self.rotary is not None:
            q_TKGh = rope(q_TKGh, step.positions_T, *self.rotary)
        return attend(q_TKGh, None, None, kv, step.attention, **self.scoring)

    def recipes(self, name: str) -> Recipes:
        children = {"qkv": "q_proj", "q_norm": "q_norm", "out": "o_proj"}
        return child_recipes(self, children, name)


class AllHeadsNormAttention(HeadNormAttention):
    """Attention with an RMS norm over all heads' q together, and over all heads' k."""

    def q_width(self, config: ModelConfig) -> int:
        return config.num_kv_heads * config.group * config.head_dim

    def k_width(self, config: ModelConfig) -> int:
        return config.num_kv_heads * config.head_dim

    def normed(self, q_TKGh: jax.Array, k_TKh: jax.Array) -> tuple[jax.Array, jax.Array]:
        T = len(q_TKGh)
        q_TKGh = self.q_norm(q_TKGh.reshape(T, -1)).reshape(q_TKGh.shape)
        return q_TKGh, self.k_norm(k_TKh.reshape(T, -1)).reshape(k_TKh.shape)


def attention_of(config: ModelConfig, layer: int, build: Build) -> Attention:
    """A layer's attention, with the norms of q and k that the configuration asks for."""
    kinds = {"none": Attention, "head": HeadNormAttention, "full": AllHeadsNormAttention}
    return kinds[config.qk_norm](config, layer, build)


def heads_of(qkv_TKgh: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q_TKGh, k_TKh and v_TKh of a fused projection."""
    q_TKGh, k_TK1h, v_TK1h = jax.lax.split(qkv_TKgh, (qkv_TKgh.shape[2] - 2, 1, 1), axis=2)
    return q_TKGh, k_TK1h[:, :, 0], v_TK1h[:, :, 0]
