"""Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434), computed on the latent that pages keep.

A position's key and value for all heads are linear in one latent of `kv_rank` numbers. Instead of expanding it, queries
are brought into the latent's space (q · W_k) and the attended latents out of it (W_v): attention is then over one shared
head of kv_rank + rope_dim, and pages hold that alone.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.api import Step
from models.config import ModelConfig
from models.layers.build import Build, child_recipes, weight
from models.layers.linear import Linear
from models.layers.norms import RMSNorm
from models.layers.rotary import layer_frequencies
from models.recipes import Piece, Recipes, split
from ops.paged_attention import attend
from ops.paged_attention.batch import KVSpec
from ops.rope import rope

LATENT_NORM_EPS = 1e-6  # of the norms inside; the published models do not take it from the configuration


class LatentAttention(nnx.Module):
    """Heads [nope + rope] in queries, one latent and one rotated key for all heads."""

    def __init__(self, config: ModelConfig, layer: int, build: Build):
        assert config.mla is not None
        mla, H, D = config.mla, config.num_heads, config.embed_dim
        self.mla, self.num_heads = mla, H
        axis = build.axis("heads", H)
        head = mla.nope_dim + mla.rope_dim
        compressed = mla.q_rank is not None
        self.q_a = Linear(D, mla.q_rank, build, (None, "embed"), bias=config.qkv_bias) if mla.q_rank else None
        self.q_a_norm = RMSNorm(mla.q_rank, LATENT_NORM_EPS) if mla.q_rank else None
        self.q = Linear(mla.q_rank or D, H * head, build, (axis, None if compressed else "embed"))
        self.kv_a = Linear(D, mla.kv_rank + mla.rope_dim, build, ("latent", "embed"), bias=config.qkv_bias)
        self.kv_a_norm = RMSNorm(mla.kv_rank, LATENT_NORM_EPS)
        self.k_up = weight((H, mla.nope_dim, mla.kv_rank), build.dtype, (axis, None, "latent"))
        self.v_up = weight((H, mla.v_dim, mla.kv_rank), build.dtype, (axis, None, "latent"))
        self.out = Linear(H * mla.v_dim, D, build, ("embed", axis), bias=config.out_bias)
        self.rope = None if config.rope is None else (config.rope, build.max_model_len)
        self.interleaved = bool(config.get("rope_interleave", True))
        self.scale = head**-0.5
        if config.rope is not None and config.rope.kind != "default" and config.rope.mscale_all_dim:
            # YaRN in DeepSeek's writing sharpens the scores too.
            self.scale *= (0.1 * config.rope.mscale_all_dim * math.log(config.rope.factor) + 1.0) ** 2

    def __call__(
        self, x_TD: jax.Array, step: Step, kv: Any, norm: Any = None, residual_TD: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        x_TD = x_TD if norm is None else norm(x_TD)
        q_THh, latent_Th = self.query(self.compressed(x_TD, step), step), self.latent(x_TD, step)
        out_T1Hh, kv = attend(q_THh[:, None], latent_Th[:, None], None, kv, step.attention, scale=self.scale)
        return self.result(out_T1Hh[:, 0], step, residual_TD), kv

    def compressed(self, x_TD: jax.Array, step: Step) -> jax.Array:
        """What queries are made of."""
        if self.q_a is None or self.q_a_norm is None:
            return x_TD
        return self.q_a_norm(self.q_a(x_TD, adapter_T=step.adapter_T))

    def query(self, compressed_TC: jax.Array, step: Step) -> jax.Array:
        """Queries in the latent's space, q_THh."""
        q_THh = self.q(compressed_TC, adapter_T=step.adapter_T).reshape(len(compressed_TC), self.num_heads, -1)
        q_rope = self.rotated(q_THh[..., self.mla.nope_dim :], step)
        q_latent = self._product("thn,hnr->thr", q_THh[..., : self.mla.nope_dim], self.k_up[...])
        return jnp.concatenate([q_latent, q_rope], axis=-1)

    def latent(self, x_TD: jax.Array, step: Step) -> jax.Array:
        """What pages keep of each position: the compressed K and V, and the rotated key of all heads."""
        latent_TR, k_rope_Th = jnp.split(self.kv_a(x_TD, adapter_T=step.adapter_T), [self.mla.kv_rank], axis=-1)
        k_rope_Th = self.rotated(k_rope_Th[:, None], step)[:, 0]
        return jnp.concatenate([self.kv_a_norm(latent_TR), k_rope_Th], axis=-1)

    def rotated(self, x_THh: jax.Array, step: Step) -> jax.Array:
        if self.rope is None:
            return x_THh
        return rope(x_THh, step.positions_T, *layer_frequencies(*self.rope), interleaved=self.interleaved)

    def result(self, out_THh: jax.Array, step: Step, residual_TD: jax.Array | None) -> jax.Array:
        """From attended latents to the residual stream."""
        out_THv = self._product("thr,hvr->thv", out_THh[..., : self.mla.kv_rank], self.v_up[...])
        y_TD = self.out(out_THv.reshape(len(out_THh), -1), adapter_T=step.adapter_T)
        return y_TD if residual_TD is None else y_TD + residual_TD

    @property
    def kv_spec(self) -> KVSpec:
        """What it keeps of each position."""
        return KVSpec(1, self.mla.kv_rank + self.mla.rope_dim, 0)

    def _product(self, equation: str, x: jax.Array, matrix: jax.Array) -> jax.Array:
        y = jnp.einsum(equation, x.astype(matrix.dtype), matrix, preferred_element_type=jnp.float32)
        return y.astype(x.dtype)

    def recipes(self, name: str) -> Recipes:
        mla, H = self.mla, self.num_heads
        children = {"kv_a": "kv_a_proj_with_mqa", "kv_a_norm": "kv_a_layernorm", "out": "o_proj"}
        if self.q_a is None:
            children |= {"q": "q_proj"}
        else:
            children |= {"q_a": "q_a_proj", "q_a_norm": "q_a_layernorm", "q": "q_b_proj"}
        recipes = child_recipes(self, children, name)
        both = Piece(f"{name}.kv_b_proj.weight", (H * (mla.nope_dim + mla.v_dim), mla.kv_rank))
        recipes["k_up"], recipes["v_up"] = split(both, mla.nope_dim, mla.v_dim)
        return recipes
