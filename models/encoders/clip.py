"""CLIP's vision transformer (Radford et al. 2021, arXiv:2103.00020) with LLaVA's projector behind it: images of one size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.encoders.vit import VitBlock, VitConfig, run_block
from models.layers import Build, LayerNorm, Linear, child_recipes, weight
from models.recipes import Recipes, one, under
from ops.activation import activation

DEFAULTS = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
    "image_size": 336, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3,
}  # fmt: skip
"""LLaVA's tower, where its config.json leaves something out."""


def clip_vision(hf: Mapping[str, Any]) -> VitConfig:
    vision = DEFAULTS | {key: value for key, value in hf["vision_config"].items() if value is not None}
    if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise ValueError(
            f"config.json: the tower {vision['model_type']!r} is not served for LLaVA; clip_vision_model is."
        )
    layer, layers = hf.get("vision_feature_layer", -2), vision["num_hidden_layers"]
    if not isinstance(layer, int) or not -layers <= layer <= layers:
        raise ValueError(f"config.json: vision_feature_layer is {layer!r}; one layer of {layers} is served.")
    patch, side = vision["patch_size"], vision["image_size"] // vision["patch_size"]
    return VitConfig(
        num_layers=layer if layer >= 0 else layers + 1 + layer,  # those behind are not computed
        embed_dim=vision["hidden_size"],
        ffw_dim=vision["intermediate_size"],
        num_heads=vision["num_attention_heads"],
        patch_dim=vision["num_channels"] * patch**2,
        out_dim=hf["hidden_size"],
        max_patches=side * side,
        fixed=True,
        norm_eps=vision["layer_norm_eps"],
        activation=vision["hidden_act"],
        extra=(
            ("patch_shape", (vision["num_channels"], patch, patch)),
            ("projector_act", hf.get("projector_hidden_act", "gelu")),
            ("projector_bias", bool(hf.get("multimodal_projector_bias", True))),
            ("layers", layers),
        ),
    )


class ClipBlock(VitBlock):
    names: ClassVar[dict[str, str]] = {
        "attn_norm": "layer_norm1",
        "attn": "self_attn",
        "mlp_norm": "layer_norm2",
        "mlp": "mlp",
    }
    attention_names: ClassVar[tuple[tuple[str, ...], str]] = (("q_proj", "k_proj", "v_proj"), "out_proj")


class Clip(nnx.Module):
    """`models.api.ImageEncoder`: what one of the last layers says of each patch, projected."""

    names: ClassVar[dict[str, str]] = {"up": "linear_1", "down": "linear_2"}

    def __init__(self, config: VitConfig, build: Build):
        self.config, self.compute_dtype = config, build.compute_dtype
        D, O = config.embed_dim, config.out_dim
        self.patch = Linear(config.patch_dim, D, build, (None, "embed"))
        self.first = weight((1, D), jnp.float32, (None, "embed"))
        self.positions = weight((config.max_patches + 1, D), jnp.float32, (None, "embed"))
        self.before = LayerNorm(D, config.norm_eps)
        self.blocks: Any = nnx.List([ClipBlock(config, layer, build) for layer in range(config.num_layers)])
        axis, bias = build.axis("ffw", O), config.get("projector_bias")
        self.up = Linear(D, O, build, (axis, "embed"), bias=bias)
        self.down = Linear(O, O, build, ("embed", axis), bias=bias)

    @property
    def unused(self) -> tuple[str, ...]:
        """Regular expressions for tensors of what lies behind the layer that is read."""
        behind = "|".join(map(str, range(self.config.num_layers, self.config.get("layers"))))
        return (r"^vision_tower\.post_layernorm\.", rf"^vision_tower\.encoder\.layers\.({behind or 'none'})\.")

    def encode(self, patches_PX: jax.Array, place_P2: jax.Array, count: jax.Array) -> jax.Array:
        x_PD = self.patch(patches_PX.astype(self.compute_dtype))
        x_PD = jnp.concatenate([self.first[...].astype(x_PD.dtype), x_PD]) + self.positions[...].astype(x_PD.dtype)
        x_PD = self.before(x_PD)
        place_P2, real_P = jnp.pad(place_P2, ((1, 0), (0, 0))), jnp.ones(len(x_PD), bool)
        for block in self.blocks:
            x_PD = run_block(block, x_PD, place_P2, real_P)
        return self.down(activation(self.config.get("projector_act"))(self.up(x_PD[1:])))

    def recipes(self) -> Recipes:
        D, name = self.config.embed_dim, "vision_tower"
        recipes: Recipes = {
            "patch.weight": one(f"{name}.embeddings.patch_embedding.weight", D, *self.config.get("patch_shape")),
            "first": one(f"{name}.embeddings.class_embedding", D),
            "positions": one(f"{name}.embeddings.position_embedding.weight", *self.positions.shape),
        }
        recipes |= under("before", self.before.recipes(f"{name}.pre_layrnorm"))
        for index, block in enumerate(self.blocks):
            recipes |= under(f"blocks.{index}", block.recipes(f"{name}.encoder.layers.{index}"))
        return recipes | child_recipes(self, self.names, "multi_modal_projector")
