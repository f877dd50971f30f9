"""The tower of Pixtral (Agrawal et al. 2024, arXiv:2410.07073) and Mistral 3: any size of image, channels that turn with a patch's
row and column. In Mistral 3 a square of patches becomes one embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.encoders.vit import VitBlock, VitConfig, run_block
from models.layers import Build, Linear, RMSNorm, child_recipes, mlp_of
from models.recipes import Recipes, one, under

EPS = 1e-5


def pixtral_vision(hf: Mapping[str, Any]) -> VitConfig:
    vision, said = hf["vision_config"], hf.get("preprocessor") or {}
    if vision.get("model_type", "pixtral") != "pixtral":
        raise ValueError(f"config.json: the tower {vision['model_type']!r} is not served with this model; pixtral is.")
    mistral3 = hf["architectures"][0].startswith("Mistral3")
    layer, layers = hf.get("vision_feature_layer", -1), vision.get("num_hidden_layers", 24)
    if layer != -1 or (not mistral3 and hf.get("vision_feature_select_strategy") != "full"):
        raise ValueError("config.json: vision_feature_layer must be -1, and vision_feature_select_strategy 'full'.")
    patch, merge = vision.get("patch_size", 16), int(hf.get("spatial_merge_size", 2)) if mistral3 else 1
    size = said.get("size") or 1024
    size = {"longest_edge": size} if isinstance(size, int) else size
    sides = (size.get(name) or size["longest_edge"] for name in ("height", "width"))
    high, wide = (-(-int(side) // (patch * merge)) * merge for side in sides)
    return VitConfig(
        num_layers=layers,
        embed_dim=vision.get("hidden_size", 1024),
        ffw_dim=vision.get("intermediate_size", 4096),
        num_heads=vision.get("num_attention_heads", 16),
        patch_dim=vision.get("num_channels", 3) * patch**2,
        out_dim=hf["hidden_size"],
        max_patches=high * wide,
        merge=merge,
        norm="rms",
        norm_eps=EPS,
        activation=vision.get("hidden_act", "gelu"),
        gated=True,
        mlp_bias=False,
        attn_bias=(False, False),
        rope_theta=float((vision.get("rope_parameters") or vision).get("rope_theta") or 10000.0),
        extra=(
            ("alternating", True),
            ("patch_shape", (vision.get("num_channels", 3), patch, patch)),
            ("mistral3", mistral3),
            ("eps", float(hf.get("rms_norm_eps", 1e-6))),
            ("projector_act", hf.get("projector_hidden_act", "gelu")),
            ("projector_bias", bool(hf.get("multimodal_projector_bias", not mistral3))),
        ),
    )


class PixtralBlock(VitBlock):
    names: ClassVar[dict[str, str]] = {
        "attn_norm": "attention_norm", "attn": "attention", "mlp_norm": "ffn_norm", "mlp": "feed_forward",
    }  # fmt: skip
    attention_names: ClassVar[tuple[tuple[str, ...], str]] = (("q_proj", "k_proj", "v_proj"), "o_proj")


class Pixtral(nnx.Module):
    """`models.api.ImageEncoder`. Where squares of patches become embeddings, those of a square come one behind the other."""

    def __init__(self, config: VitConfig, build: Build):
        self.config, self.compute_dtype = config, build.compute_dtype
        D, O, m = config.embed_dim, config.out_dim, config.merge
        self.patch = Linear(config.patch_dim, D, build, (None, "embed"))
        self.before = RMSNorm(D, EPS)
        self.blocks: Any = nnx.List([PixtralBlock(config, layer, build) for layer in range(config.num_layers)])
        own = config.get("mistral3")
        self.norm = RMSNorm(D, config.get("eps")) if own else None
        self.merge = Linear(m * m * D, D, build, ("embed", None)) if own else None
        axis, bias = build.axis("ffw", O), config.get("projector_bias")
        self.up = Linear(D, O, build, (axis, "embed"), bias=bias)
        self.down = Linear(O, O, build, ("embed", axis), bias=bias)

    def encode(self, patches_PX: jax.Array, place_P2: jax.Array, count: jax.Array) -> jax.Array:
        x_PD = self.before(self.patch(patches_PX.astype(self.compute_dtype)))
        real_P = jnp.arange(len(x_PD)) < count
        for block in self.blocks:
            x_PD = run_block(block, x_PD, place_P2, real_P)
        if self.norm is not None and self.merge is not None:
            m, D = self.config.merge, self.config.embed_dim
            # The checkpoint puts a channel's values of a square side by side.
            x_PD = self.merge(self.norm(x_PD).reshape(-1, m * m, D).swapaxes(1, 2).reshape(-1, m * m * D))
        return mlp_of(self.up, self.down, self.config.get("projector_act"), x_PD)

    def recipes(self) -> Recipes:
        D, shape = self.config.embed_dim, self.config.get("patch_shape")
        recipes: Recipes = {"patch.weight": one("vision_tower.patch_conv.weight", D, *shape)}
        recipes |= under("before", self.before.recipes("vision_tower.ln_pre"))
        for index, block in enumerate(self.blocks):
            recipes |= under(f"blocks.{index}", block.recipes(f"vision_tower.transformer.layers.{index}"))
        names = {"up": "linear_1", "down": "linear_2"}
        if self.norm is not None:
            names |= {"norm": "norm", "merge": "patch_merger.merging_layer"}
        return recipes | child_recipes(self, names, "multi_modal_projector")
