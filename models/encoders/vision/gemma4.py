"""The tower of Gemma 4 (Google 2026): any size of image within a bound of its area, channels that turn with a patch's column and
row, norms before and behind each block, and the mean of each square of patches for the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.encoders.bounded import Bounded
from models.encoders.vit import VitConfig, attend_patches, axial_frequencies, run_block
from models.layers import Build, Linear, RMSNorm, child_recipes, weight
from models.recipes import Recipes, Stack, one, under
from ops.activation import activation
from ops.linear import PackedInt8Weight
from ops.norm import rms_norm
from ops.paged_attention import whole
from ops.rope import cos_sin, rope

SOFT_TOKENS = 280


def gemma4_vision(hf: Mapping[str, Any]) -> VitConfig:
    vision, said, film = hf["vision_config"], hf.get("preprocessor") or {}, hf.get("video_preprocessor") or {}
    width, heads = vision.get("hidden_size", 768), vision.get("num_attention_heads", 12)
    if vision.get("num_key_value_heads", heads) != heads or vision.get("head_dim", width // heads) * heads != width:
        raise ValueError("config.json: a tower whose heads are not its width, or that share keys, is not served.")
    if vision.get("attention_bias"):
        raise ValueError("config.json: a tower whose attention has biases is not served.")
    patch, merge = vision.get("patch_size", 16), vision.get("pooling_kernel_size", 3)
    return VitConfig(
        num_layers=vision.get("num_hidden_layers", 16),
        embed_dim=width,
        ffw_dim=vision.get("intermediate_size", 3072),
        num_heads=heads,
        patch_dim=3 * patch**2,
        out_dim=hf["hidden_size"],
        max_patches=max(int(said.get("max_soft_tokens") or SOFT_TOKENS), int(film.get("max_soft_tokens") or 0))
        * merge**2,
        merge=merge,
        norm="rms",
        norm_eps=vision.get("rms_norm_eps", 1e-6),
        activation=vision.get("hidden_activation", "gelu_pytorch_tanh"),
        gated=True,
        rope_theta=float((vision.get("rope_parameters") or {}).get("rope_theta") or 100.0),
        together=hf.get("use_bidirectional_attention") == "vision",
        extra=(
            ("places", vision.get("position_embedding_size", 10240)),
            ("bounded", bool(vision.get("use_clipped_linears", False))),
            ("standard", bool(vision.get("standardize", False))),
        ),
    )


class Gemma4PatchAttention(nnx.Module):
    """Norms over each head's q, k and v, the last one without a scale. The first half of a head's channels turns with the
    column, the second with the row."""

    names: ClassVar[dict[str, str]] = {
        "q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj", "q_norm": "q_norm", "k_norm": "k_norm",
    }  # fmt: skip

    def __init__(self, config: VitConfig, build: Build):
        D, H, h = config.embed_dim, config.num_heads, config.head_dim
        self.heads, self.theta, self.eps = (H, h), config.rope_theta or 0.0, config.norm_eps
        axis = build.axis("heads", H)
        self.q, self.k, self.v = (Bounded(config, (D, D), build, (axis, "embed")) for _ in range(3))
        self.out = Bounded(config, (D, D), build, ("embed", axis))
        self.q_norm, self.k_norm = RMSNorm(h, config.norm_eps), RMSNorm(h, config.norm_eps)

    def __call__(self, x_PD: jax.Array, place_P2: jax.Array, real_P: jax.Array) -> jax.Array:
        P, (H, h) = len(x_PD), self.heads
        q_PHh, k_PHh, v_PHh = (product(x_PD).reshape(P, H, h) for product in (self.q, self.k, self.v))
        q_PHh, k_PHh = _paired(self.q_norm(q_PHh)), _paired(self.k_norm(k_PHh))
        v_PHh = rms_norm(v_PHh, None, self.eps)
        place_2P, turns = place_P2[:, ::-1].T, axial_frequencies(self.theta, h)
        if isinstance(self.q.product.weight.get_value(), PackedInt8Weight) and whole.supports(H, h, "cpu"):
            qkv_1PH3h, count_1 = jnp.stack([q_PHh, k_PHh, v_PHh], axis=2)[None], jnp.sum(real_P, dtype=jnp.int32)[None]
            out = whole.attend_all(qkv_1PH3h, count_1, scale=1.0, angles=cos_sin(place_2P, turns))
        else:
            q_PHh, k_PHh = (rope(x, place_2P, turns) for x in (q_PHh, k_PHh))
            out = attend_patches(q_PHh, k_PHh, v_PHh, real_P, scale=1.0)
        return self.out(out.reshape(P, H * h).astype(x_PD.dtype))

    def recipes(self, name: str) -> Recipes:
        return child_recipes(self, self.names, name)


def _paired(x_PHh: jax.Array) -> jax.Array:
    """Each half's two quarters turn with each other; `ops.rope` turns the halves."""
    P, H, h = x_PHh.shape
    return x_PHh.reshape(P, H, 2, 2, h // 4).swapaxes(2, 3).reshape(P, H, h)


class Gemma4PatchMLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    names: ClassVar[dict[str, str]] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

    def __init__(self, config: VitConfig, build: Build):
        D, F, axis = config.embed_dim, config.ffw_dim, build.axis("ffw", config.ffw_dim)
        self.activation = config.activation
        self.gate, self.up = (Bounded(config, (D, F), build, (axis, "embed")) for _ in range(2))
        self.down = Bounded(config, (F, D), build, ("embed", axis))

    def __call__(self, x_PD: jax.Array) -> jax.Array:
        return self.down(activation(self.activation)(self.gate(x_PD)) * self.up(x_PD))

    def recipes(self, name: str) -> Recipes:
        return child_recipes(self, self.names, name)


class Gemma4Block(nnx.Module):
    """x + norm(attn(norm(x))), then x + norm(mlp(norm(x)))."""

    names: ClassVar[dict[str, str]] = {
        "attn_norm": "input_layernorm", "attn": "self_attn", "attn_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm", "mlp": "mlp", "mlp_out_norm": "post_feedforward_layernorm",
    }  # fmt: skip

    def __init__(self, config: VitConfig, build: Build):
        D, eps = config.embed_dim, config.norm_eps
        self.attn_norm, self.attn_out_norm, self.mlp_norm, self.mlp_out_norm = (RMSNorm(D, eps) for _ in range(4))
        self.attn, self.mlp = Gemma4PatchAttention(config, build), Gemma4PatchMLP(config, build)

    def __call__(self, x_PD: jax.Array, place_P2: jax.Array, real_P: jax.Array) -> jax.Array:
        x_PD = x_PD + self.attn_out_norm(self.attn(self.attn_norm(x_PD), place_P2, real_P))
        return x_PD + self.mlp_out_norm(self.mlp(self.mlp_norm(x_PD)))

    def recipes(self, name: str) -> Recipes:
        return child_recipes(self, self.names, name)


class Gemma4Vision(nnx.Module):
    """`models.api.ImageEncoder`. Patches come square by square, so that those of a square are one embedding's."""

    def __init__(self, config: VitConfig, build: Build):
        self.config, self.compute_dtype = config, build.compute_dtype
        D, places = config.embed_dim, config.get("places")
        self.patch = Linear(config.patch_dim, D, build, (None, "embed"))
        self.places = weight((2, places, D), jnp.float32, (None, None, "embed"))
        self.blocks: Any = nnx.List([Gemma4Block(config, build) for _ in range(config.num_layers)])
        self.standard = weight((2, D), jnp.float32, (None, None)) if config.get("standard") else None
        self.project = Linear(D, config.out_dim, build, ("embed", None))

    def encode(self, patches_PX: jax.Array, place_P2: jax.Array, count: jax.Array) -> jax.Array:
        config, D = self.config, self.config.embed_dim
        x_PD = self.patch((2 * (patches_PX - 0.5)).astype(self.compute_dtype))
        row_P, column_P = place_P2.T
        x_PD = x_PD + (self.places[...][0, column_P] + self.places[...][1, row_P]).astype(x_PD.dtype)
        real_P = jnp.arange(len(x_PD)) < count
        for block in self.blocks:
            x_PD = run_block(block, x_PD, place_P2, real_P)
        pooled_ND = x_PD.astype(jnp.float32).reshape(-1, config.merge**2, D).mean(axis=1) * D**0.5
        if self.standard is not None:
            bias_D, scale_D = self.standard[...]
            pooled_ND = (pooled_ND - bias_D) * scale_D
        return self.project(rms_norm(pooled_ND.astype(x_PD.dtype), None, config.norm_eps))

    @property
    def unused(self) -> tuple[str, ...]:
        """Regular expressions for tensors that are not read by eyes."""
        return (r"^(model\.)?(audio_tower|embed_audio)\.",)

    def recipes(self) -> Recipes:
        config, name = self.config, "vision_tower"
        D, O = config.embed_dim, config.out_dim
        recipes: Recipes = {
            "patch.weight": one(f"{name}.patch_embedder.input_proj.weight", D, config.patch_dim),
            "places": one(f"{name}.patch_embedder.position_embedding_table", *self.places.shape),
            "project.weight": one("model.embed_vision.embedding_projection.weight", O, D),
        }
        for index, block in enumerate(self.blocks):
            recipes |= under(f"blocks.{index}", block.recipes(f"{name}.encoder.layers.{index}"))
        if self.standard is not None:
            recipes["standard"] = Stack(tuple(one(f"{name}.{part}", D) for part in ("std_bias", "std_scale")))
        return recipes
