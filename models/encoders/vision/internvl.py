"""InternVL's tower (Chen et al. 2024, arXiv:2404.16821): a vision transformer with scaled blocks over tiles, squares of whose
patches are put side by side and projected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.encoders.vit import PatchMLP, VitBlock, VitConfig, run_block, squares
from models.layers import Build, LayerNorm, Linear, child_recipes, mlp_of, weight
from models.recipes import Recipes, one, under

TILES = 12


def internvl_vision(hf: Mapping[str, Any]) -> VitConfig:
    vision, said = hf["vision_config"], hf.get("preprocessor") or {}
    sides = [vision.get("image_size", (448, 448)), vision.get("patch_size", (14, 14))]
    (high, wide), (p, q) = ((side, side) if isinstance(side, int) else tuple(side) for side in sides)
    merge = round(1 / float(hf.get("downsample_ratio", 0.5)))
    if high != wide or p != q or high // p % merge:
        raise ValueError(f"config.json: tiles of {high} x {wide} in patches of {p} x {q} are not served.")
    if vision.get("use_qk_norm") or not vision.get("use_absolute_position_embeddings", True):
        raise ValueError("config.json: a tower with norms of q and k, or without learned positions, is not served.")
    layer = hf.get("vision_feature_layer", -1)
    if layer != -1 or hf.get("vision_feature_select_strategy", "default") != "default":
        raise ValueError("config.json: vision_feature_layer must be -1, and vision_feature_select_strategy 'default'.")
    most = int(said.get("max_patches") or TILES)
    bias = bool(vision.get("attention_bias", False))
    return VitConfig(
        num_layers=vision.get("num_hidden_layers", 24),
        embed_dim=vision.get("hidden_size", 1024),
        ffw_dim=vision.get("intermediate_size", 4096),
        num_heads=vision.get("num_attention_heads", 16),
        patch_dim=3 * p**2,
        out_dim=hf["hidden_size"],
        max_patches=(most + 1 if most > 1 else 1) * (high // p) ** 2,
        tile=(high // p) ** 2,
        first=1,
        merge=merge,
        norm="rms" if vision.get("norm_type") == "rms_norm" else "layer",
        norm_eps=vision.get("layer_norm_eps", 1e-6),
        activation=vision.get("hidden_act", "gelu"),
        attn_bias=(bias, True),
        extra=(
            ("side", high // p),
            ("patch", p),
            ("after", not vision.get("use_mean_pooling", True)),
            ("projector_act", hf.get("projector_hidden_act", "gelu")),
        ),
    )


class InternBlock(VitBlock):
    """x + scale attn(norm(x)), then x + scale mlp(norm(x))."""

    names: ClassVar[dict[str, str]] = {
        "attn_norm": "layernorm_before", "attn": "attention", "mlp_norm": "layernorm_after", "mlp": "mlp",
    }  # fmt: skip
    attention_names: ClassVar[tuple[tuple[str, ...], str]] = (("q_proj", "k_proj", "v_proj"), "projection_layer")

    def __init__(self, config: VitConfig, layer: int, build: Build):
        super().__init__(config, layer, build)
        self.attn_scale = weight((config.embed_dim,), jnp.float32, (None,))
        self.mlp_scale = weight((config.embed_dim,), jnp.float32, (None,))

    def __call__(self, x_PD: jax.Array, place_P2: jax.Array, real_P: jax.Array) -> jax.Array:
        assert isinstance(self.mlp, PatchMLP)
        x_PD = x_PD + self.attn_scale[...].astype(x_PD.dtype) * self.attn(self.attn_norm(x_PD), place_P2, real_P)
        return x_PD + self.mlp_scale[...].astype(x_PD.dtype) * self.mlp(self.mlp_norm(x_PD))

    def recipes(self, name: str) -> Recipes:
        D = self.attn_scale.shape[0]
        scales = {"attn_scale": one(f"{name}.lambda_1", D), "mlp_scale": one(f"{name}.lambda_2", D)}
        return super().recipes(name) | scales


class InternVL(nnx.Module):
    """`models.api.ImageEncoder`."""

    names: ClassVar[dict[str, str]] = {"norm": "layer_norm", "up": "linear_1", "down": "linear_2"}

    def __init__(self, config: VitConfig, build: Build):
        self.config, self.compute_dtype = config, build.compute_dtype
        D, O = config.embed_dim, config.out_dim
        self.patch = Linear(config.patch_dim, D, build, (None, "embed"), bias=True)
        self.first = weight((1, D), jnp.float32, (None, "embed"))
        self.positions = weight((config.tile + 1, D), jnp.float32, (None, "embed"))
        self.blocks: Any = nnx.List([InternBlock(config, layer, build) for layer in range(config.num_layers)])
        self.after = LayerNorm(D, config.norm_eps) if config.get("after") else None
        wide, axis = D * config.merge**2, build.axis("ffw", O)
        self.norm = LayerNorm(wide, 1e-5)
        self.up = Linear(wide, O, build, (axis, "embed"), bias=True)
        self.down = Linear(O, O, build, ("embed", axis), bias=True)

    @property
    def unused(self) -> tuple[str, ...]:
        """Regular expressions for tensors that are not read."""
        return (r"^vision_tower\.embeddings\.mask_token$",)

    def encode(self, patches_PX: jax.Array, place_P2: jax.Array, count: jax.Array) -> jax.Array:
        tile, D = self.config.tile, self.config.embed_dim
        x_NSD = self.patch(patches_PX.astype(self.compute_dtype)).reshape(-1, tile, D)
        front = jnp.broadcast_to(self.first[...].astype(x_NSD.dtype), (len(x_NSD), 1, D))
        x_PD = (jnp.concatenate([front, x_NSD], axis=1) + self.positions[...].astype(x_NSD.dtype)).reshape(-1, D)
        at_P2, real_P = jnp.zeros((len(x_PD), 2), jnp.int32), jnp.ones(len(x_PD), bool)
        for block in self.blocks:
            x_PD = run_block(block, x_PD, at_P2, real_P)
        x_PD = x_PD if self.after is None else self.after(x_PD)
        x_PD = x_PD.reshape(-1, tile + 1, D)[:, 1:].reshape(-1, D)
        x_NM = self.norm(squares(x_PD, self.config.get("side"), self.config.merge))
        return mlp_of(self.up, self.down, self.config.get("projector_act"), x_NM)

    def recipes(self) -> Recipes:
        D, p, name = self.config.embed_dim, self.config.get("patch"), "vision_tower"
        recipes: Recipes = {
            "patch.weight": one(f"{name}.embeddings.patch_embeddings.projection.weight", D, 3, p, p),
            "patch.bias": one(f"{name}.embeddings.patch_embeddings.projection.bias", D),
            "first": one(f"{name}.embeddings.cls_token", 1, 1, D),
            "positions": one(f"{name}.embeddings.position_embeddings", 1, *self.positions.shape),
        }
        for index, block in enumerate(self.blocks):
            recipes |= under(f"blocks.{index}", block.recipes(f"{name}.encoder.layer.{index}"))
        if self.after is not None:
            recipes |= under("after", self.after.recipes(f"{name}.layernorm"))
        return recipes | child_recipes(self, self.names, "multi_modal_projector")
