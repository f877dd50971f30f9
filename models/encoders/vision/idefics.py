"""The tower of Idefics3 and SmolVLM (Laurençon et al. 2024, arXiv:2408.12637): SigLIP's over tiles, squares of whose patches
are put side by side and projected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from models.encoders.vision.plain import PlainVit, plain_config
from models.encoders.vit import VitConfig, squares
from models.layers import Build, Linear
from models.recipes import Recipes, under


def idefics_vision(hf: Mapping[str, Any]) -> VitConfig:
    said = hf.get("preprocessor") or {}
    longest, tile = (
        value.get("longest_edge") or default if isinstance(value, Mapping) else value or default
        for value, default in ((said.get("size"), 1456), (said.get("max_image_size"), 364))
    )
    tiles = math.ceil(longest / tile) ** 2 + 1 if said.get("do_image_splitting", True) and longest > tile else 1
    merge = int(hf.get("scale_factor", 2))
    config = plain_config(
        hf, ("idefics3_vision", "smolvlm_vision"), tiles=tiles, name="model.vision_model", merge=merge
    )
    patch, side = config.get("patch_shape")[-1], config.get("side")
    if tile != side * patch or side % merge:
        raise ValueError(
            f"tiles of {tile} pixels do not fit a tower for {side} x {side} patches of {patch} of which {merge} x {merge} are put "
            "together."
        )
    return config


class Idefics(nnx.Module):
    """`models.api.ImageEncoder`."""

    def __init__(self, config: VitConfig, build: Build):
        self.config = config
        self.vit = PlainVit(config, build, after=True, order=_order(config.get("side")))
        self.project = Linear(config.embed_dim * config.merge**2, config.out_dim, build, ("embed", None))

    @property
    def unused(self) -> tuple[str, ...]:
        """Regular expressions for tensors that are not read."""
        return self.vit.unused

    def encode(self, patches_PX: jax.Array, place_P2: jax.Array, count: jax.Array) -> jax.Array:
        return self.project(squares(self.vit(patches_PX), self.config.get("side"), self.config.merge))

    def recipes(self) -> Recipes:
        projected = self.project.recipes("model.connector.modality_projection.proj")
        return under("vit", self.vit.recipes()) | under("project", projected)


def _order(side: int) -> tuple[int, ...]:
    """Which learned position each patch of a whole tile has. The network finds it from fractions of the side, in
    float32, which may not give each its own."""
    step = 1.0 / side
    bounds = (step + np.arange(math.ceil((1.0 - step) / step)) * step).astype(np.float32)
    at = np.minimum(np.arange(side, dtype=np.float32) * np.float32(step), np.float32(1.0 - 1e-6))
    found = np.searchsorted(bounds, at, side="right")
    return tuple((found[:, None] * side + found[None]).reshape(-1).tolist())
