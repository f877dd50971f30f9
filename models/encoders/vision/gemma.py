"""The tower of Gemma 3 (arXiv:2503.19786): SigLIP's over one tile, the mean of each square of patches normed and projected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from models.encoders.vision.plain import PlainVit, plain_config
from models.encoders.vit import VitConfig, squares
from models.layers import Build, Linear, RMSNorm
from models.recipes import Recipes, one, under


def gemma3_vision(hf: Mapping[str, Any]) -> VitConfig:
    vision = hf["vision_config"]
    side = int(vision.get("image_size") or 896) // int(vision.get("patch_size") or 14)
    tokens = round(float(hf.get("mm_tokens_per_image", 256)) ** 0.5)
    if tokens < 1 or side % tokens:
        raise ValueError(f"config.json: {tokens} x {tokens} embeddings of {side} x {side} patches: not whole squares.")
    full = {"image_size": 896} | {key: value for key, value in vision.items() if value is not None}
    return plain_config({**hf, "vision_config": full}, ("siglip_vision_model",), merge=side // tokens, together=True)


class Gemma3(nnx.Module):
    """`models.api.ImageEncoder`."""

    def __init__(self, config: VitConfig, build: Build):
        self.config = config
        self.vit = PlainVit(config, build, after=True)
        self.norm = RMSNorm(config.embed_dim, config.norm_eps, True)
        self.project = Linear(config.embed_dim, config.out_dim, build, ("embed", None))

    @property
    def unused(self) -> tuple[str, ...]:
        """Regular expressions for tensors that are not read."""
        return self.vit.unused

    def encode(self, patches_PX: jax.Array, place_P2: jax.Array, count: jax.Array) -> jax.Array:
        D, side, merge = self.config.embed_dim, self.config.get("side"), self.config.merge
        pooled_ND = squares(self.vit(patches_PX), side, merge).reshape(-1, merge**2, D).mean(axis=1)
        return self.project(self.norm(pooled_ND))

    def recipes(self) -> Recipes:
        D, O, name = self.config.embed_dim, self.config.out_dim, "multi_modal_projector"
        recipes = under("vit", self.vit.recipes()) | under("norm", self.norm.recipes(f"{name}.mm_soft_emb_norm"))
        return recipes | {"project.weight": one(f"{name}.mm_input_projection_weight", D, O, turned=True)}
