"""LLaVA's towers: CLIP or SigLIP with a projector of two layers behind it. LLaVA 1.5 (Liu et al. 2023, arXiv:2310.03744) reads one
tile an image; LLaVA-NeXT (2024) and LLaVA-OneVision (Li et al. 2024, arXiv:2408.03326) several, and put an embedding of its own
behind each row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.encoders.vision.plain import PlainVit, plain_config
from models.encoders.vit import VitConfig
from models.layers import Build, Linear, child_recipes, mlp_of, weight
from models.recipes import Recipes, one, under

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
TAPS = 4
"""Embeddings that one of LLaVA-OneVision's is a mean of, where there are too many."""


def llava_vision(hf: Mapping[str, Any]) -> VitConfig:
    return _config(hf, ("clip_vision_model", "siglip_vision_model"), -2, 1)


def next_vision(hf: Mapping[str, Any]) -> VitConfig:
    tiles, high = _tiles(hf)
    return _config(hf, ("clip_vision_model", "siglip_vision_model"), -2, tiles, picked=1, lines=high)


def onevision_vision(hf: Mapping[str, Any]) -> VitConfig:
    tiles, high = _tiles(hf)
    return _config(hf, ("siglip_vision_model",), -1, tiles, picked=TAPS, lines=high)


def _config(hf: Mapping[str, Any], kinds: tuple[str, ...], layer: int, tiles: int, **more: Any) -> VitConfig:
    front = (hf["vision_config"].get("model_type") or kinds[0]) == "clip_vision_model"
    wanted = "default" if front else "full"
    said = hf.get("vision_feature_select_strategy") or wanted
    if front and said == "full" and not more:  # one tile, whose token in front is an embedding too
        wanted, more = "full", {"lines": 1}
    if said != wanted:
        raise ValueError(f"config.json: vision_feature_select_strategy must be {wanted!r} with this tower.")
    extra = (
        ("projector_act", hf.get("projector_hidden_act", "gelu")),
        ("projector_bias", bool(hf.get("multimodal_projector_bias", True))),
        ("keep", front and said == "full"),
    )
    return plain_config(hf, kinds, hf.get("vision_feature_layer", layer), tiles, extra=extra, **more)


def _tiles(hf: Mapping[str, Any]) -> tuple[int, int]:
    """(tiles of the largest image, rows of embeddings of a tile)."""
    sizes = (hf.get("preprocessor") or {}).get("image_grid_pinpoints") or hf.get("image_grid_pinpoints") or PINPOINTS
    side = int(hf["vision_config"].get("image_size") or 336)
    if any(height % side or width % side for height, width in sizes):
        raise ValueError(f"config.json: image_grid_pinpoints must be whole tiles of {side} pixels.")
    patch = int(hf["vision_config"].get("patch_size") or 14)
    return 1 + max(height * width // side**2 for height, width in sizes), side // patch


class Llava(nnx.Module):
    """`models.api.ImageEncoder`: what one of the last layers says of each patch, projected; and where rows end with one embedding,
    that behind them all."""

    names: ClassVar[dict[str, str]] = {"up": "linear_1", "down": "linear_2"}

    def __init__(self, config: VitConfig, build: Build):
        self.config = config
        self.vit = PlainVit(config, build)
        D, O = config.embed_dim, config.out_dim
        axis, bias = build.axis("ffw", O), config.get("projector_bias")
        self.up = Linear(D, O, build, (axis, "embed"), bias=bias)
        self.down = Linear(O, O, build, ("embed", axis), bias=bias)
        self.line = weight((1, O), jnp.float32, (None, "embed")) if config.picked else None

    @property
    def unused(self) -> tuple[str, ...]:
        """Regular expressions for tensors that are not read."""
        return self.vit.unused

    def encode(self, patches_PX: jax.Array, place_P2: jax.Array, count: jax.Array) -> jax.Array:
        rows_NM = mlp_of(self.up, self.down, self.config.get("projector_act"), self.vit(patches_PX))
        return rows_NM if self.line is None else jnp.concatenate([rows_NM, self.line[...].astype(rows_NM.dtype)])

    def recipes(self) -> Recipes:
        recipes = under("vit", self.vit.recipes()) | child_recipes(self, self.names, "multi_modal_projector")
        if self.line is not None:
            recipes["line"] = one("model.image_newline", self.config.out_dim)
        return recipes
