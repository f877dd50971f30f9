"""The tower of GLM-4.1V, 4.5V and 4.6V (Z.ai 2025, arXiv:2507.01006): any size of image, channels that turn with a patch's row and
column, learned positions that are stretched over the image bicubically, and squares of patches joined by a convolution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.encoders.vision.qwen import ROPE_THETA, patch_shape
from models.encoders.vit import VitBlock, VitConfig, run_block
from models.layers import Build, GatedMLP, LayerNorm, Linear, RMSNorm, weight
from models.recipes import Recipes, one, under
from ops.activation import activation

MAX_PIXELS = 28 * 28 * 15000
"""Of an image and its frames of a patch together, where the processor's file leaves that out."""
SHARPNESS = -0.75
"""Of the bicubic kernel (Keys 1981), as torch has it."""


def glm_vision(hf: Mapping[str, Any]) -> VitConfig:
    vision, said = hf["vision_config"], hf.get("preprocessor") or {}
    shape, image = patch_shape(vision), vision.get("image_size", 336)
    if not isinstance(image, int) or not isinstance(shape[-1], int):
        raise ValueError("config.json: a tower whose positions or patches are not square is not served.")
    size = said.get("size") or {}
    pixels = int(said.get("max_pixels") or size.get("longest_edge") or MAX_PIXELS) // shape[1]
    return VitConfig(
        num_layers=vision.get("depth", 24),
        embed_dim=vision.get("hidden_size", 1536),
        ffw_dim=vision.get("out_hidden_size", 4096),
        num_heads=vision.get("num_heads", 12),
        patch_dim=math.prod(shape),
        out_dim=vision.get("out_hidden_size", 4096),
        max_patches=max(1, pixels // shape[-1] ** 2),
        merge=vision.get("spatial_merge_size", 2),
        norm="rms",
        norm_eps=vision.get("rms_norm_eps", 1e-5),
        activation=vision.get("hidden_act", "silu"),
        gated=True,
        mlp_bias=False,
        attn_bias=(bool(vision.get("attention_bias", False)), False),
        rope_theta=float((vision.get("rope_parameters") or {}).get("rope_theta") or ROPE_THETA),
        extra=(
            ("patch_shape", shape),
            ("side", image // shape[-1]),
            ("merger_dim", vision.get("intermediate_size", 13696)),
        ),
    )


class GlmMerger(nnx.Module):
    """Gated block behind a projection and a norm; all of the decoder's width."""

    def __init__(self, config: VitConfig, build: Build):
        O, wide = config.out_dim, config.get("merger_dim")
        self.project = Linear(O, O, build, (None, "embed"))
        self.norm = LayerNorm(O, 1e-5)
        shaped: Any = _Shaped(O, wide, config.activation)
        self.mlp = GatedMLP(shaped, build)

    def __call__(self, x_NM: jax.Array) -> jax.Array:
        return self.mlp(activation("gelu")(self.norm(self.project(x_NM))), None)[0]

    def recipes(self, name: str) -> Recipes:
        recipes = under("project", self.project.recipes(f"{name}.proj"))
        recipes |= under("norm", self.norm.recipes(f"{name}.post_projection_norm"))
        return recipes | under("mlp", self.mlp.recipes(name))


class _Shaped:
    """The fields of a `ModelConfig` that a gated block reads."""

    mlp_bias = False

    def __init__(self, embed_dim: int, ffw_dim: int, activation: str):
        self.embed_dim, self.ffw_dim, self.activation = embed_dim, ffw_dim, activation


class GlmVision(nnx.Module):
    """`models.api.ImageEncoder`. Patches come square by square, so that those of a square are one embedding's."""

    def __init__(self, config: VitConfig, build: Build):
        self.config, self.compute_dtype = config, build.compute_dtype
        D, eps = config.embed_dim, config.norm_eps
        self.patch = Linear(config.patch_dim, D, build, (None, "embed"), bias=True)
        self.before, self.after = RMSNorm(D, eps), RMSNorm(D, eps)
        self.positions = weight((config.get("side") ** 2, D), jnp.float32, (None, "embed"))
        self.blocks: Any = nnx.List([VitBlock(config, layer, build) for layer in range(config.num_layers)])
        self.join = Linear(D * config.merge**2, config.out_dim, build, ("embed", None), bias=True)
        self.merger = GlmMerger(config, build)

    def encode(self, patches_PX: jax.Array, place_P2: jax.Array, count: jax.Array) -> jax.Array:
        square, D = self.config.merge**2, self.config.embed_dim
        x_PD = self.before(self.patch(patches_PX.astype(self.compute_dtype)))
        real_P = jnp.arange(len(x_PD)) < count
        x_PD = x_PD + self.stretched(place_P2, real_P).astype(x_PD.dtype)
        for block in self.blocks:
            x_PD = run_block(block, x_PD, place_P2, real_P)
        # The convolution's weight has a channel's values of a square side by side.
        x_NM = self.after(x_PD).reshape(-1, square, D).swapaxes(1, 2).reshape(-1, square * D)
        return self.merger(self.join(x_NM))

    def stretched(self, place_P2: jax.Array, real_P: jax.Array) -> jax.Array:
        """float32 [P, D]: the learned grid of positions over the image's, bicubically, edges on edges."""
        side = self.config.get("side")
        size_2 = jnp.max(jnp.where(real_P[:, None], place_P2, 0), axis=0) + 1
        # As torch goes: to [-1, 1] and back again.
        norm_P2 = (place_P2.astype(jnp.float32) + 0.5) / size_2.astype(jnp.float32) * 2 - 1
        at_P2 = ((norm_P2 + 1) * side - 1) / 2
        low_P2 = jnp.floor(at_P2)
        shares_P24 = _cubic(at_P2 - low_P2)
        total = jnp.zeros((len(place_P2), self.config.embed_dim), jnp.float32)
        for row in range(4):
            for column in range(4):
                tap_P2 = jnp.clip(low_P2.astype(jnp.int32) + jnp.array([row, column]) - 1, 0, side - 1)
                share_P = shares_P24[:, 0, row] * shares_P24[:, 1, column]
                total = total + self.positions[...][tap_P2[:, 0] * side + tap_P2[:, 1]] * share_P[:, None]
        return total

    def recipes(self) -> Recipes:
        D, m, name = self.config.embed_dim, self.config.merge, "visual"
        recipes: Recipes = {
            "patch.weight": one(f"{name}.patch_embed.proj.weight", D, *self.config.get("patch_shape")),
            "patch.bias": one(f"{name}.patch_embed.proj.bias", D),
            "positions": one(f"{name}.embeddings.position_embedding.weight", *self.positions.shape),
            "join.weight": one(f"{name}.downsample.weight", self.config.out_dim, D, m, m),
            "join.bias": one(f"{name}.downsample.bias", self.config.out_dim),
        }
        recipes |= under("before", self.before.recipes(f"{name}.post_conv_layernorm"))
        recipes |= under("after", self.after.recipes(f"{name}.post_layernorm"))
        for index, block in enumerate(self.blocks):
            recipes |= under(f"blocks.{index}", block.recipes(f"{name}.blocks.{index}"))
        return recipes | under("merger", self.merger.recipes(f"{name}.merger"))


def _cubic(part: jax.Array) -> jax.Array:
    """[..., 4]: shares of the values one before, at, one behind and two behind a place."""
    a = SHARPNESS

    def near(x: jax.Array) -> jax.Array:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: jax.Array) -> jax.Array:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return jnp.stack([far(part + 1), near(part), near(1 - part), far(2 - part)], axis=-1)
