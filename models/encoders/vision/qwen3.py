"""The towers of Qwen3-VL and of Qwen3.5 and later (Qwen Team 2025, arXiv:2511.21631): as Qwen2-VL's, with learned positions that
are interpolated for an image's grid, and, in Qwen3-VL, what some layers say added to the decoder's first layers (DeepStack,
Meng et al. 2024, arXiv:2406.04334)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.encoders.vision.qwen import ROPE_THETA, max_patches, patch_shape
from models.encoders.vit import VitBlock, VitConfig, run_block
from models.layers import Build, LayerNorm, Linear, child_recipes, mlp_of, weight
from models.recipes import Recipes, one, under

MAX_PIXELS = 4096 * 4096


def qwen3_vision(hf: Mapping[str, Any]) -> VitConfig:
    vision = hf["vision_config"]
    shape = patch_shape(vision, 16)
    deep = hf.get("architectures", ("",))[0].startswith("Qwen3VL")
    return VitConfig(
        num_layers=vision.get("depth", 27),
        embed_dim=vision.get("hidden_size", 1152),
        ffw_dim=vision.get("intermediate_size", 4304),
        num_heads=vision.get("num_heads", 16),
        patch_dim=math.prod(shape),
        out_dim=vision.get("out_hidden_size", 3584),
        max_patches=max_patches(hf, shape[-1], MAX_PIXELS, shape[1]),
        merge=vision.get("spatial_merge_size", 2),
        activation=vision.get("hidden_act", "gelu_pytorch_tanh"),
        rope_theta=float((vision.get("rope_parameters") or {}).get("rope_theta") or ROPE_THETA),
        taps=tuple(vision.get("deepstack_visual_indexes", (8, 16, 24))) if deep else (),
        extra=(("patch_shape", shape), ("side", math.isqrt(vision.get("num_position_embeddings", 2304)))),
    )


class Qwen3Block(VitBlock):
    mlp_names: ClassVar[tuple[str, str]] = ("linear_fc1", "linear_fc2")


class Qwen3Merger(nnx.Module):
    """Squares of patches to embeddings.

    Args:
        late: the norm goes over a square, not over each of its patches.
    """

    def __init__(self, config: VitConfig, build: Build, late: bool = False):
        self.width, self.late = config.embed_dim * config.merge**2, late
        self.norm = LayerNorm(self.width if late else config.embed_dim, config.norm_eps)
        axis = build.axis("ffw", self.width)
        self.up = Linear(self.width, self.width, build, (axis, "embed"), bias=True)
        self.down = Linear(self.width, config.out_dim, build, ("embed", axis), bias=True)

    def __call__(self, x_PD: jax.Array) -> jax.Array:
        x_NM = self.norm(x_PD.reshape(-1, self.width)) if self.late else self.norm(x_PD).reshape(-1, self.width)
        return mlp_of(self.up, self.down, "gelu", x_NM)

    def recipes(self, name: str) -> Recipes:
        return child_recipes(self, {"norm": "norm", "up": "linear_fc1", "down": "linear_fc2"}, name)


class Qwen3Vision(nnx.Module):
    """`models.api.ImageEncoder`. An embedding has what is added to the decoder's first layers behind it."""

    def __init__(self, config: VitConfig, build: Build):
        self.config, self.compute_dtype = config, build.compute_dtype
        D, side = config.embed_dim, config.get("side")
        self.patch = Linear(config.patch_dim, D, build, (None, "embed"), bias=True)
        self.positions = weight((side * side, D), jnp.float32, (None, "embed"))
        self.blocks: Any = nnx.List([Qwen3Block(config, layer, build) for layer in range(config.num_layers)])
        self.merger = Qwen3Merger(config, build)
        self.tapped: Any = nnx.List([Qwen3Merger(config, build, late=True) for _ in config.taps])

    def encode(self, patches_PX: jax.Array, place_P2: jax.Array, count: jax.Array) -> jax.Array:
        x_PD = self.patch(patches_PX.astype(self.compute_dtype))
        real_P = jnp.arange(len(x_PD)) < count
        x_PD = x_PD + self.interpolated(place_P2, real_P).astype(x_PD.dtype)
        taps: dict[int, jax.Array] = {}
        for layer, block in enumerate(self.blocks):
            x_PD = run_block(block, x_PD, place_P2, real_P)
            if layer in self.config.taps:
                which = self.config.taps.index(layer)
                taps[which] = self.tapped[which](x_PD)
        return jnp.concatenate([self.merger(x_PD), *(taps[i] for i in range(len(taps)))], axis=-1)

    def interpolated(self, place_P2: jax.Array, real_P: jax.Array) -> jax.Array:
        """float32 [P, D]: the learned grid of positions, stretched over the image's, bilinearly, corners on corners."""
        side = self.config.get("side")
        last_2 = jnp.maximum(jnp.max(jnp.where(real_P[:, None], place_P2, 0), axis=0), 1)
        at_P2 = place_P2.astype(jnp.float32) * (side - 1) / last_2.astype(jnp.float32)
        low_P2 = jnp.floor(at_P2)
        part_P2 = at_P2 - low_P2
        total = jnp.zeros((len(place_P2), self.config.embed_dim), jnp.float32)
        for row in (0, 1):
            for column in (0, 1):
                tap_P2 = jnp.clip(low_P2.astype(jnp.int32) + jnp.array([row, column]), 0, side - 1)
                share_P2 = jnp.where(jnp.array([row, column]) == 1, part_P2, 1 - part_P2)
                taken_PD = self.positions[...][tap_P2[:, 0] * side + tap_P2[:, 1]]
                total = total + taken_PD * (share_P2[:, 0] * share_P2[:, 1])[:, None]
        return total

    def recipes(self) -> Recipes:
        D, shape = self.config.embed_dim, self.config.get("patch_shape")
        name = "visual.patch_embed.proj"
        recipes: Recipes = {
            "patch.weight": one(f"{name}.weight", D, *shape),
            "patch.bias": one(f"{name}.bias", D),
            "positions": one("visual.pos_embed.weight", self.config.get("side") ** 2, D),
        }
        for index, block in enumerate(self.blocks):
            recipes |= under(f"blocks.{index}", block.recipes(f"visual.blocks.{index}"))
        for index, merger in enumerate(self.tapped):
            recipes |= under(f"tapped.{index}", merger.recipes(f"visual.deepstack_merger_list.{index}"))
        return recipes | under("merger", self.merger.recipes("visual.merger"))
