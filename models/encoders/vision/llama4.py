"""The tower of Llama 4 (Meta 2025): tiles of one size with a token behind each one's patches, channels that turn with a patch's
column and row, and squares of patches put side by side for a projector of three layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.encoders.vit import PatchAttention, VitBlock, VitConfig, run_block, squares
from models.layers import Build, LayerNorm, Linear, weight
from models.recipes import Recipe, Recipes, alternating, deal, one, under
from ops.activation import activation

TILES = 16


def llama4_vision(hf: Mapping[str, Any]) -> VitConfig:
    vision, said = hf["vision_config"], hf.get("preprocessor") or {}
    image, p = vision.get("image_size", 448), vision.get("patch_size", 14)
    if not isinstance(image, int) or not isinstance(p, int):
        raise ValueError("config.json: a tower whose tiles or patches are not square is not served.")
    side, merge = image // p, round(1 / float(vision.get("pixel_shuffle_ratio", 0.5)))
    width, wide = vision.get("hidden_size", 768), vision.get("intermediate_size", 5632)
    if side % merge or width * merge**2 != wide:
        raise ValueError(
            f"config.json: squares of {merge} x {merge} patches of {width} numbers are not {wide} numbers."
        )
    most = int(said.get("max_patches") or TILES)
    return VitConfig(
        num_layers=vision.get("num_hidden_layers", 34),
        embed_dim=width,
        ffw_dim=wide,
        num_heads=vision.get("num_attention_heads", 16),
        patch_dim=3 * p**2,
        out_dim=hf["hidden_size"],
        max_patches=(most + 1 if most > 1 else 1) * side**2,
        tile=side**2,
        first=1,
        merge=merge,
        norm_eps=1e-5,
        rope_theta=float((vision.get("rope_parameters") or vision).get("rope_theta") or 10000.0),
        extra=(
            ("side", side),
            ("inner", (vision.get("projector_input_dim", 4096), vision.get("projector_output_dim", 4096))),
        ),
    )


class Llama4PatchAttention(PatchAttention):
    """Neighbouring channels turn together in checkpoints; here those of a head's halves do."""

    def recipes(self, name: str) -> Recipes:
        (H, h), recipes = self.heads, under("out", self.out.recipes(f"{name}.o_proj"))
        for kind, width in (("weight", (H * h,)), ("bias", ())):
            q, k, v = (one(f"{name}.{part}_proj.{kind}", H * h, *width) for part in "qkv")
            recipes[f"qkv.{kind}"] = deal(H, _halves(q, H), _halves(k, H), v)
        return recipes


def _halves(rows: Recipe, heads: int) -> Recipe:
    """Of each head the even rows, then the odd ones."""
    return deal(heads, *alternating(rows, 2))


class Llama4Block(VitBlock):
    names: ClassVar[dict[str, str]] = {
        "attn_norm": "input_layernorm", "attn": "self_attn", "mlp_norm": "post_attention_layernorm", "mlp": "mlp",
    }  # fmt: skip

    def __init__(self, config: VitConfig, layer: int, build: Build):
        super().__init__(config, layer, build)
        self.attn = Llama4PatchAttention(config, layer, build)


class Llama4Vision(nnx.Module):
    """`models.api.ImageEncoder`."""

    def __init__(self, config: VitConfig, build: Build):
        self.config, self.compute_dtype = config, build.compute_dtype
        D, eps, (inner, outer) = config.embed_dim, config.norm_eps, config.get("inner")
        self.patch = Linear(config.patch_dim, D, build, (None, "embed"))
        self.last = weight((1, D), jnp.float32, (None, "embed"))
        self.positions = weight((config.tile + 1, D), jnp.float32, (None, "embed"))
        self.before, self.after = LayerNorm(D, eps), LayerNorm(D, eps)
        self.blocks: Any = nnx.List([Llama4Block(config, layer, build) for layer in range(config.num_layers)])
        axis = build.axis("ffw", inner)
        self.up = Linear(D * config.merge**2, inner, build, (axis, "embed"))
        self.down = Linear(inner, outer, build, ("embed", axis))
        self.project = Linear(outer, config.out_dim, build, ("embed", None))

    def encode(self, patches_PX: jax.Array, place_P2: jax.Array, count: jax.Array) -> jax.Array:
        config, D = self.config, self.config.embed_dim
        tile, side = config.tile, config.get("side")
        x_NSD = self.patch(patches_PX.astype(self.compute_dtype)).reshape(-1, tile, D)
        last = jnp.broadcast_to(self.last[...].astype(x_NSD.dtype), (len(x_NSD), 1, D))
        x_NSD = jnp.concatenate([x_NSD, last], axis=1) + self.positions[...].astype(x_NSD.dtype)
        x_PD = self.before(x_NSD.reshape(-1, D))
        # Column before row, from 1 on; the token behind them turns not at all.
        places = np.concatenate([np.stack([np.arange(tile) % side, np.arange(tile) // side], 1) + 1, [[0, 0]]])
        at_P2, real_P = jnp.tile(jnp.asarray(places, jnp.int32), (len(x_NSD), 1)), jnp.ones(len(x_PD), bool)
        for block in self.blocks:
            x_PD = run_block(block, x_PD, at_P2, real_P)
        x_PD = self.after(x_PD).reshape(-1, tile + 1, D)[:, :-1].reshape(-1, D)
        gelu = activation("gelu")
        hidden_NM = gelu(self.down(gelu(self.up(squares(x_PD, side, config.merge)))))
        return self.project(hidden_NM)

    def recipes(self) -> Recipes:
        D, name, O = self.config.embed_dim, "vision_model", self.config.out_dim
        inner, outer = self.config.get("inner")
        adapter = f"{name}.vision_adapter.mlp"
        recipes: Recipes = {
            "patch.weight": one(f"{name}.patch_embedding.linear.weight", D, self.config.patch_dim),
            "last": one(f"{name}.class_embedding", D),
            "positions": one(f"{name}.positional_embedding_vlm", *self.positions.shape),
            "up.weight": one(f"{adapter}.fc1.weight", inner, D * self.config.merge**2),
            "down.weight": one(f"{adapter}.fc2.weight", outer, inner),
            "project.weight": one("multi_modal_projector.linear_1.weight", O, outer),
        }
        recipes |= under("before", self.before.recipes(f"{name}.layernorm_pre"))
        recipes |= under("after", self.after.recipes(f"{name}.layernorm_post"))
        for index, block in enumerate(self.blocks):
            recipes |= under(f"blocks.{index}", block.recipes(f"{name}.model.layers.{index}"))
        return recipes
