"""The towers of Qwen2-VL (Wang et al. 2024, arXiv:2409.12191) and Qwen2.5-VL (Bai et al. 2025, arXiv:2502.13923): any size of
image, channels that turn with a patch's row and column, and four patches merged into one embedding. In Qwen2.5-VL most layers
look within windows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.encoders.vit import VitBlock, VitConfig, make_norm, run_block
from models.layers import Build, Linear, child_recipes, mlp_of
from models.recipes import Recipes, one, under

ROPE_THETA = 10000.0
MAX_PIXELS = 28 * 28 * 1280
VIDEO_PIXELS = 32 * 32 * 768
"""Of a video, where its file leaves that out; of Qwen2-VL's a little less."""


def max_patches(hf: Mapping[str, Any], patch: int, default_pixels: int = MAX_PIXELS, frames: int = 1) -> int:
    """Patches of the largest image, or of the largest frames that are cut together, that the processors let through.

    Args:
        hf: config.json, with the content of preprocessor_config.json as "preprocessor", and of the videos' as
            "video_preprocessor", where there is one.
        frames: of a video that share its pixels, at least.
    """
    said = hf.get("preprocessor") or {}
    most = _pixels(said, default_pixels)
    if hf.get("video_token_id") is not None:
        most = max(most, _pixels(hf.get("video_preprocessor") or said, VIDEO_PIXELS) // frames)
    return max(1, most // patch**2)


def _pixels(said: Mapping[str, Any], default: int) -> int:
    size = said.get("size") or {}
    return int(said.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or default)


def qwen2_vision(hf: Mapping[str, Any]) -> VitConfig:
    vision = hf["vision_config"]
    width, patch = vision.get("embed_dim", 1280), vision.get("patch_size", 14)
    return VitConfig(
        num_layers=vision.get("depth", 32),
        embed_dim=width,
        ffw_dim=int(width * vision.get("mlp_ratio", 4)),
        num_heads=vision.get("num_heads", 16),
        patch_dim=math.prod(patch_shape(vision)),
        out_dim=vision.get("hidden_size", 3584),
        max_patches=max_patches(hf, patch),
        merge=vision.get("spatial_merge_size", 2),
        activation=vision.get("hidden_act", "quick_gelu"),
        rope_theta=_theta(vision),
        extra=(("patch_shape", patch_shape(vision)),),
    )


def qwen2_5_vision(hf: Mapping[str, Any]) -> VitConfig:
    vision = hf["vision_config"]
    layers, patch = vision.get("depth", 32), vision.get("patch_size", 14)
    full = vision.get("fullatt_block_indexes", (7, 15, 23, 31))
    merge = vision.get("spatial_merge_size", 2)
    side = vision.get("window_size", 112) // merge // patch * merge  # whole squares of those that are merged
    return VitConfig(
        num_layers=layers,
        embed_dim=vision.get("hidden_size", 3584),
        ffw_dim=vision.get("intermediate_size", 3420),
        num_heads=vision.get("num_heads", 16),
        patch_dim=math.prod(patch_shape(vision)),
        out_dim=vision.get("out_hidden_size", 3584),
        max_patches=max_patches(hf, patch),
        merge=vision.get("spatial_merge_size", 2),
        norm="rms",
        activation=vision.get("hidden_act", "silu"),
        gated=True,
        rope_theta=_theta(vision),
        windows=tuple(None if layer in full else side for layer in range(layers)),
        extra=(("patch_shape", patch_shape(vision)),),
    )


def patch_shape(vision: Mapping[str, Any], default: int = 14) -> tuple[int, int, int, int]:
    """Of a patch: channels, frames, rows, columns."""
    patch = vision.get("patch_size", default)
    return vision.get("in_channels", 3), vision.get("temporal_patch_size", 2), patch, patch


def _theta(vision: Mapping[str, Any]) -> float:
    return float((vision.get("rope_parameters") or {}).get("rope_theta") or ROPE_THETA)


class Merger(nnx.Module):
    """Squares of patches to embeddings of the decoder's width: an MLP over what lies next to each other."""

    def __init__(self, config: VitConfig, build: Build):
        self.norm = make_norm(config)
        self.width = config.embed_dim * config.merge**2
        axis = build.axis("ffw", self.width)
        self.up = Linear(self.width, self.width, build, (axis, "embed"), bias=True)
        self.down = Linear(self.width, config.out_dim, build, ("embed", axis), bias=True)

    def __call__(self, x_PD: jax.Array) -> jax.Array:
        x_NM = self.norm(x_PD).reshape(-1, self.width)
        return mlp_of(self.up, self.down, "gelu", x_NM)

    def recipes(self, name: str) -> Recipes:
        return child_recipes(self, {"norm": "ln_q", "up": "mlp.0", "down": "mlp.2"}, name)


class QwenVision(nnx.Module):
    """`models.api.ImageEncoder`. Patches come square by square, so that four in a row become one embedding."""

    def __init__(self, config: VitConfig, build: Build):
        self.config, self.compute_dtype = config, build.compute_dtype
        self.patch = Linear(config.patch_dim, config.embed_dim, build, (None, "embed"))
        self.blocks: Any = nnx.List([VitBlock(config, layer, build) for layer in range(config.num_layers)])
        self.merger = Merger(config, build)

    def encode(self, patches_PX: jax.Array, place_P2: jax.Array, count: jax.Array) -> jax.Array:
        x_PD = self.patch(patches_PX.astype(self.compute_dtype))
        real_P = jnp.arange(len(x_PD)) < count
        for block in self.blocks:
            x_PD = run_block(block, x_PD, place_P2, real_P)
        return self.merger(x_PD)

    def recipes(self) -> Recipes:
        D, shape = self.config.embed_dim, self.config.get("patch_shape")
        recipes: Recipes = {"patch.weight": one("visual.patch_embed.proj.weight", D, *shape)}
        for index, block in enumerate(self.blocks):
            recipes |= under(f"blocks.{index}", block.recipes(f"visual.blocks.{index}"))
        return recipes | under("merger", self.merger.recipes("visual.merger"))
