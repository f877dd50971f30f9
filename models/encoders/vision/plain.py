"""Plain vision transformers over tiles of one size: CLIP's (Radford et al. 2021, arXiv:2103.00020), SigLIP's (Zhai et al. 2023,
arXiv:2303.15343) and Idefics3's, which is SigLIP's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.encoders.vit import VitBlock, VitConfig, make_norm, run_block
from models.layers import Build, Linear, weight
from models.recipes import Recipes, one, under

CLIP = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
    "image_size": 336, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3,
}  # fmt: skip
"""LLaVA's tower, where its config.json leaves something out."""
SIGLIP = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14,
    "image_size": 384, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_channels": 3,
}  # fmt: skip
KINDS = {
    "clip_vision_model": CLIP,
    "siglip_vision_model": SIGLIP,
    "idefics3_vision": SIGLIP
    | {"patch_size": 32, "image_size": 224, "intermediate_size": 3072, "num_hidden_layers": 12},
    "smolvlm_vision": SIGLIP
    | {"patch_size": 32, "image_size": 224, "intermediate_size": 3072, "num_hidden_layers": 12},
}
"""What each kind's config.json may leave out."""


def plain_config(
    hf: Mapping[str, Any],
    kinds: tuple[str, ...],
    layer: int = -1,
    tiles: int = 1,
    name: str = "vision_tower",
    **more: Any,
) -> VitConfig:
    """A plain tower of one of some kinds.

    Args:
        kinds: that are served; the first is meant where config.json says none.
        layer: whose output is read, as transformers counts them: -1 is the last; those behind are not computed.
        tiles: of one image, at most.
        name: of the tower in checkpoints.
        more: fields of VitConfig; `extra` goes behind what all have.
    """
    kind = hf["vision_config"].get("model_type") or kinds[0]
    if kind not in kinds:
        raise ValueError(f"config.json: the tower {kind!r} is not served with this model; {', '.join(kinds)} are.")
    vision = KINDS[kind] | {key: value for key, value in hf["vision_config"].items() if value is not None}
    layers = vision["num_hidden_layers"]
    if not isinstance(layer, int) or isinstance(layer, bool) or not -layers <= layer <= layers:
        raise ValueError(f"config.json: vision_feature_layer is {layer!r}; one layer of {layers} is served.")
    clip, patch = kind == "clip_vision_model", vision["patch_size"]
    side = vision["image_size"] // patch
    extra = (
        ("patch_shape", (vision["num_channels"], patch, patch)),
        ("name", name),
        ("clip", clip),
        ("side", side),
        ("layers", layers),
        *more.pop("extra", ()),
    )
    return VitConfig(
        num_layers=layer if layer >= 0 else layers + 1 + layer,
        embed_dim=vision["hidden_size"],
        ffw_dim=vision["intermediate_size"],
        num_heads=vision["num_attention_heads"],
        patch_dim=vision["num_channels"] * patch**2,
        out_dim=hf["hidden_size"],
        max_patches=tiles * side * side,
        tile=side * side,
        first=int(clip),
        norm_eps=vision["layer_norm_eps"],
        activation=vision["hidden_act"],
        extra=extra,
        **more,
    )


class PlainBlock(VitBlock):
    names: ClassVar[dict[str, str]] = {
        "attn_norm": "layer_norm1",
        "attn": "self_attn",
        "mlp_norm": "layer_norm2",
        "mlp": "mlp",
    }
    attention_names: ClassVar[tuple[tuple[str, ...], str]] = (("q_proj", "k_proj", "v_proj"), "out_proj")


class PlainVit(nnx.Module):
    """Tiles of patches in, what its last layer says of each out. CLIP's has a token in front of them, and a norm before the first
    layer.

    Args:
        after: whether the norm behind the last layer is applied.
        order: which of the learned positions each patch of a tile has; None for its own.
    """

    def __init__(self, config: VitConfig, build: Build, after: bool = False, order: tuple[int, ...] | None = None):
        self.config, self.compute_dtype, self.order = config, build.compute_dtype, order
        D, clip = config.embed_dim, config.get("clip")
        self.patch = Linear(config.patch_dim, D, build, (None, "embed"), bias=not clip)
        self.first = weight((1, D), jnp.float32, (None, "embed")) if clip else None
        self.positions = weight((config.tile + config.first, D), jnp.float32, (None, "embed"))
        self.before = make_norm(config) if clip else None
        self.blocks: Any = nnx.List([PlainBlock(config, layer, build) for layer in range(config.num_layers)])
        self.after = make_norm(config) if after else None

    def __call__(self, patches_PX: jax.Array) -> jax.Array:
        """[P, D] of tiles, without the tokens in front where those are not asked for."""
        tile, first, D = self.config.tile, self.config.first, self.config.embed_dim
        x_NSD = self.patch(patches_PX.astype(self.compute_dtype)).reshape(-1, tile, D)
        if self.first is not None:
            front = jnp.broadcast_to(self.first[...].astype(x_NSD.dtype), (len(x_NSD), 1, D))
            x_NSD = jnp.concatenate([front, x_NSD], axis=1)
        positions = self.positions[...] if self.order is None else self.positions[...][jnp.array(self.order)]
        x_PD = (x_NSD + positions.astype(x_NSD.dtype)).reshape(-1, D)
        x_PD = x_PD if self.before is None else self.before(x_PD)
        place_P2, real_P = jnp.zeros((len(x_PD), 2), jnp.int32), jnp.ones(len(x_PD), bool)
        for block in self.blocks:
            x_PD = run_block(block, x_PD, place_P2, real_P)
        x_PD = x_PD if self.after is None else self.after(x_PD)
        return x_PD if self.config.get("keep") else x_PD.reshape(-1, tile + first, D)[:, first:].reshape(-1, D)

    @property
    def unused(self) -> tuple[str, ...]:
        """Regular expressions for tensors of what is not computed."""
        name = self.config.get("name").replace(".", r"\.")
        behind = "|".join(map(str, range(self.config.num_layers, self.config.get("layers"))))
        unread = (rf"^{name}\.encoder\.layers\.({behind or 'none'})\.", rf"^{name}\.head\.")
        return unread if self.after is not None else (*unread, rf"^{name}\.post_layernorm\.")

    def recipes(self) -> Recipes:
        D, name = self.config.embed_dim, self.config.get("name")
        recipes: Recipes = {
            "patch.weight": one(f"{name}.embeddings.patch_embedding.weight", D, *self.config.get("patch_shape")),
            "positions": one(f"{name}.embeddings.position_embedding.weight", *self.positions.shape),
        }
        if self.first is not None and self.before is not None:
            recipes["first"] = one(f"{name}.embeddings.class_embedding", D)
            recipes |= under("before", self.before.recipes(f"{name}.pre_layrnorm"))
        else:
            recipes["patch.bias"] = one(f"{name}.embeddings.patch_embedding.bias", D)
        for index, block in enumerate(self.blocks):
            recipes |= under(f"blocks.{index}", block.recipes(f"{name}.encoder.layers.{index}"))
        if self.after is not None:
            recipes |= under("after", self.after.recipes(f"{name}.post_layernorm"))
        return recipes
