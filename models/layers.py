"""The parts that models are built from. Weights are `[out, in]`; parameters carry the logical axes they shard by.

Modules are constructed abstractly: a parameter starts as a `jax.ShapeDtypeStruct`, and a loader puts the array there.
`recipes(name)` says from which checkpoint tensors, `name` being the module's in Hugging Face's naming.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from models.api import Step
from models.config import ModelConfig, RopeConfig
from models.heads import PlacedHeads, Spread
from models.recipes import Recipes, deal, one, pieces, under
from models.rotary import frequencies
from ops.activation import activation
from ops.linear import RmsNorm, embed, gated_mlp, linear
from ops.norm import layer_norm, rms_norm
from ops.paged_attention import attend, attend_rope
from ops.paged_attention.batch import KVSpec
from ops.rope import rope
from sharding.rules import DEFAULT_RULES, ShardingRules, num_shards


@dataclasses.dataclass(frozen=True)
class Build:
    """How a network is put on devices; what it computes is `ModelConfig`'s.

    Attributes:
        dtype: of the weights; norm scales and biases are always float32.
        compute_dtype: of activations. float32 on CPU, where a bf16 result costs a pass.
        mesh: None for one device.
        max_model_len: the longest context to serve, tokens.
    """

    dtype: Any = jnp.float32
    compute_dtype: Any = jnp.float32
    mesh: Mesh | None = None
    rules: ShardingRules = DEFAULT_RULES
    max_model_len: int = 2048

    def shards(self, logical: str, count: int) -> int:
        """Into how many pieces `count` things along a logical axis are cut: 1 where they cannot be cut evenly."""
        shards = num_shards(self.mesh, logical, self.rules)
        return shards if count % shards == 0 else 1

    def axis(self, logical: str, count: int) -> str | None:
        """`logical` where its `count` things can be cut evenly, else None: every device has them all."""
        return logical if count % num_shards(self.mesh, logical, self.rules) == 0 else None


class Weight(nnx.Param):
    """A parameter that a loader fills.

    Metadata: `logical_axes` says how it is sharded; `gate_shards`, where there is one, is (axis, S): gate and up are
    interleaved along that axis in S pieces; `spread`, where heads do not divide the mesh, how it is made from the array
    that recipes describe.
    """

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that recipes assemble."""
        spread = self.get_metadata().get("spread")
        return tuple(self.shape) if spread is None else spread.stored_shape(tuple(self.shape))

    def from_stored(self, array: np.ndarray) -> np.ndarray:
        """The parameter's array from the one that recipes assemble."""
        spread = self.get_metadata().get("spread")
        array = array.reshape(self.stored_shape)
        return array if spread is None else spread.apply(array)


def weight(shape: tuple[int, ...], dtype: Any, logical_axes: tuple[str | None, ...], **metadata: Any) -> Weight:
    """A parameter that has no value yet."""
    return Weight(jax.ShapeDtypeStruct(shape, dtype), logical_axes=logical_axes, **metadata)


class Linear(nnx.Module):
    """y = x W^T + b. `weight` is dense [O, I] or a quantized pytree: `ops.linear` dispatches on its type."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        build: Build,
        axes: tuple[str | None, str | None],
        bias: bool = False,
        **metadata: Any,
    ):
        self.weight = weight((outputs, inputs), build.dtype, axes, **metadata)
        if metadata.get("spread") is not None and metadata["spread"].part == "out":
            metadata = {}  # its bias is of the rows, which no head owns
        self.bias = weight((outputs,), jnp.float32, axes[:1], **metadata) if bias else None

    def __call__(
        self, x_TI: jax.Array, out_dtype: Any = None, norm: Norm | None = None, residual_TO: jax.Array | None = None
    ) -> jax.Array:
        """norm(x) W^T + b + residual; a kernel that can takes norm and residual along with the product."""
        x_TI, rms = _norm_of(x_TI, norm)
        return linear(
            x_TI, self.weight.get_value(), self.bias_value(), norm=rms, residual_TO=residual_TO, out_dtype=out_dtype
        )

    def bias_value(self) -> jax.Array | None:
        return None if self.bias is None else self.bias[...]

    def recipes(self, name: str) -> Recipes:
        shape = self.weight.stored_shape
        recipes = {"weight": one(f"{name}.weight", *shape)}
        if self.bias is not None:
            recipes["bias"] = one(f"{name}.bias", shape[0])
        return recipes


class Embedding(nnx.Module):
    """The token table [V, D]; with tied embeddings also the output projection."""

    def __init__(self, rows: int, width: int, build: Build):
        self.weight = weight((rows, width), build.dtype, (build.axis("vocab", rows), "embed"))

    def __call__(self, tokens_T: jax.Array, dtype: Any) -> jax.Array:
        return embed(self.weight.get_value(), tokens_T, dtype)

    def logits(self, hidden_RD: jax.Array) -> jax.Array:
        """hidden · table: float32 logits_RV."""
        return linear(hidden_RD, self.weight.get_value(), out_dtype=jnp.float32)

    def recipes(self, name: str) -> Recipes:
        return {"weight": one(f"{name}.weight", *self.weight.shape)}


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a float32 scale.

    Args:
        offset: the checkpoint stores the scale less one.
    """

    def __init__(self, width: int, eps: float, offset: bool = False):
        self.eps, self.offset = eps, offset
        self.scale = weight((width,), jnp.float32, (None,))

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        return rms_norm(x_TD, self.scale[...], self.eps)

    def recipes(self, name: str) -> Recipes:
        add = (lambda stored: stored.astype(np.float32) + 1.0) if self.offset else None
        return {"scale": one(f"{name}.weight", *self.scale.shape, assemble=add)}


class LayerNorm(nnx.Module):
    """Mean-and-variance norm with float32 scale and, unless told otherwise, bias."""

    def __init__(self, width: int, eps: float, bias: bool = True):
        self.eps = eps
        self.scale = weight((width,), jnp.float32, (None,))
        self.bias = weight((width,), jnp.float32, (None,)) if bias else None

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        return layer_norm(x_TD, self.scale[...], None if self.bias is None else self.bias[...], self.eps)

    def recipes(self, name: str) -> Recipes:
        recipes = {"scale": one(f"{name}.weight", *self.scale.shape)}
        return recipes if self.bias is None else recipes | {"bias": one(f"{name}.bias", *self.scale.shape)}


Norm = RMSNorm | LayerNorm


def _norm_of(x_TD: jax.Array, norm: Norm | None) -> tuple[jax.Array, RmsNorm | None]:
    """x and the norm that a product takes along; other kinds of norm are applied to x here."""
    if isinstance(norm, RMSNorm):
        return x_TD, RmsNorm(norm.scale[...], norm.eps)
    return (x_TD if norm is None else norm(x_TD)), None


class Attention(nnx.Module):
    """Grouped-query attention over pages.

    q, k and v are one projection, laid out per KV head: its G query heads, then its k, then its v. So cutting the rows
    into `model` pieces gives each device whole KV heads with the query heads that read them, and the product's result
    reshapes to [T, K, G + 2, h]. Where the axis does not divide K, heads are repeated or padded: see models/heads.py.
    """

    def __init__(self, config: ModelConfig, layer: int, build: Build):
        K, G, h, D = config.num_kv_heads, config.group, config.head_dim, config.embed_dim
        # A norm over all heads together cannot tell copies and padding from heads: there everyone has them all.
        shards = num_shards(build.mesh, "kv_heads", build.rules) if config.qk_norm != "full" else 1
        placed = PlacedHeads(K, G, h, shards)
        spread: dict[str, Any] = {}
        if placed.unchanged:
            axis = build.axis("kv_heads", K)
        else:
            axis = "kv_heads"
            spread = {part: {"spread": Spread(placed, part)} for part in ("qkv", "out", "sinks")}
        self.heads, self.placed = (K, G, h), (placed.kv_heads, placed.group, h)
        Kp, Gp, _ = self.placed
        qkv_axes, out_axes = (axis, "embed"), ("embed", axis)
        self.qkv = Linear(D, Kp * (Gp + 2) * h, build, qkv_axes, bias=config.qkv_bias, **spread.get("qkv", {}))
        self.out = Linear(Kp * Gp * h, D, build, out_axes, bias=config.out_bias, **spread.get("out", {}))
        self.qk_norm = config.qk_norm
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            self.q_norm = RMSNorm(h if per_head else K * G * h, config.norm_eps, config.norm_offset)
            self.k_norm = RMSNorm(h if per_head else K * h, config.norm_eps, config.norm_offset)
        rotary = config.layer_rope(layer)
        self.rope = None if rotary is None else (rotary, build.max_model_len)
        self.scale = h**-0.5 if config.attn_scale is None else config.attn_scale
        self.window, self.softcap = config.windows[layer], config.attn_softcap
        sinks = spread.get("sinks", {})
        self.sinks = weight((Kp, Gp), jnp.float32, (axis, None), **sinks) if config.attn_sinks else None

    def __call__(
        self,
        x_TD: jax.Array,
        step: Step,
        kv: Any,
        norm: Norm | None = None,
        residual_TD: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """attention(norm(x)) + residual, and the layer's updated pages."""
        T, (K, G, h) = x_TD.shape[0], self.placed
        qkv_TKgh = self.qkv(x_TD, norm=norm).reshape(T, K, G + 2, h)
        rotary = None if self.rope is None else layer_frequencies(*self.rope)
        sinks_KG = None if self.sinks is None else self.sinks[...]
        limits = {"window": self.window, "softcap": self.softcap, "sinks_KG": sinks_KG}
        if self.qk_norm == "none":
            out_TKGh, kv = attend_rope(
                qkv_TKgh, step.positions_T, rotary, kv, step.attention, scale=self.scale, **limits
            )
        else:
            q_TKGh, k_TKh, v_TKh = qkv_TKgh[:, :, :G], qkv_TKgh[:, :, G], qkv_TKgh[:, :, G + 1]
            if self.qk_norm == "head":
                q_TKGh, k_TKh = self.q_norm(q_TKGh), self.k_norm(k_TKh)
            else:
                q_TKGh = self.q_norm(q_TKGh.reshape(T, -1)).reshape(q_TKGh.shape)
                k_TKh = self.k_norm(k_TKh.reshape(T, -1)).reshape(k_TKh.shape)
            if rotary is not None:
                q_TKGh, k_TKh = (rope(x, step.positions_T, *rotary) for x in (q_TKGh, k_TKh))
            out_TKGh, kv = attend(q_TKGh, k_TKh, v_TKh, kv, step.attention, scale=self.scale, **limits)
        return self.out(out_TKGh.reshape(T, K * G * h), residual_TO=residual_TD), kv

    def recipes(self, name: str) -> Recipes:
        K, G, h = self.heads
        sources = [f"{name}.{part}_proj" for part in "qkv"]
        rows = (K * G * h, K * h, K * h)
        D = self.qkv.weight.shape[1]
        weights = pieces([f"{source}.weight" for source in sources], *((n, D) for n in rows))
        recipes = {"qkv.weight": deal(K, *weights)}
        if self.qkv.bias is not None:
            biases = pieces([f"{source}.bias" for source in sources], *((n,) for n in rows))
            recipes["qkv.bias"] = deal(K, *biases)
        recipes |= under("out", self.out.recipes(f"{name}.o_proj"))
        if self.qk_norm != "none":
            recipes |= under("q_norm", self.q_norm.recipes(f"{name}.q_norm"))
            recipes |= under("k_norm", self.k_norm.recipes(f"{name}.k_norm"))
        if self.sinks is not None:
            recipes["sinks"] = one(f"{name}.sinks", K * G)
        return recipes


class MLP(nnx.Module):
    """down(act(up(x))), both with biases where the configuration says so.

    Args:
        names: of the two projections in checkpoints.
    """

    def __init__(self, config: ModelConfig, build: Build, names: tuple[str, str] = ("c_fc", "c_proj")):
        axis = build.axis("ffw", config.ffw_dim)
        self.names, self.activation = names, config.activation
        self.up = Linear(config.embed_dim, config.ffw_dim, build, (axis, "embed"), bias=config.mlp_bias)
        self.down = Linear(config.ffw_dim, config.embed_dim, build, ("embed", axis), bias=config.mlp_bias)

    def __call__(
        self, x_TD: jax.Array, step: Step, norm: Norm | None = None, residual_TD: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """mlp(norm(x)) + residual, and the experts visited: none."""
        return self.down(activation(self.activation)(self.up(x_TD, norm=norm)), residual_TO=residual_TD), ()

    def recipes(self, name: str) -> Recipes:
        up, down = self.names
        return child_recipes(self, {"up": up, "down": down}, name)


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202).

    gate and up are one projection with rows [S, 2, F / S], S the number of `model` shards: each device's piece is
    then its part of the gate followed by the same part of up.
    """

    def __init__(self, config: ModelConfig, build: Build, ffw_dim: int | None = None):
        D, F = config.embed_dim, ffw_dim or config.ffw_dim
        axis = build.axis("ffw", F)
        self.shards = build.shards("ffw", F)
        self.activation = config.activation
        layout = {"gate_shards": (0, self.shards)}
        self.gate_up = Linear(D, 2 * F, build, (axis, "embed"), bias=config.mlp_bias, **layout)
        self.down = Linear(F, D, build, ("embed", axis), bias=config.mlp_bias)

    def __call__(
        self, x_TD: jax.Array, step: Step | None, norm: Norm | None = None, residual_TD: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """mlp(norm(x)) + residual, and the experts visited: none. Encoders have no step."""
        x_TD, rms = _norm_of(x_TD, norm)
        y_TD = gated_mlp(
            x_TD,
            self.gate_up.weight.get_value(),
            self.down.weight.get_value(),
            self.activation,
            gate_up_bias=self.gate_up.bias_value(),
            down_bias_D=self.down.bias_value(),
            norm=rms,
            residual_TD=residual_TD,
            shards=self.shards,
        )
        return y_TD, ()

    def recipes(self, name: str) -> Recipes:
        F, D = self.down.weight.shape[1], self.down.weight.shape[0]
        sources = (f"{name}.gate_proj", f"{name}.up_proj")
        weights = pieces([f"{s}.weight" for s in sources], (F, D), (F, D))
        recipes = {"gate_up.weight": deal(self.shards, *weights)}
        if self.gate_up.bias is not None:
            biases = pieces([f"{s}.bias" for s in sources], (F,), (F,))
            recipes["gate_up.bias"] = deal(self.shards, *biases)
        return recipes | under("down", self.down.recipes(f"{name}.down_proj"))


def child_recipes(module: nnx.Module, children: dict[str, str], name: str) -> Recipes:
    """The recipes of a module's children: attribute -> name below the module's own."""
    recipes: Recipes = {}
    for attribute, child in children.items():
        recipes |= under(attribute, getattr(module, attribute).recipes(f"{name}.{child}" if name else child))
    return recipes


def kv_spec(config: ModelConfig, attention: Attention) -> KVSpec:
    """What an `Attention` layer keeps for each position."""
    return KVSpec(attention.placed[0], config.head_dim, config.head_dim, attention.window)


@functools.lru_cache(maxsize=64)
def layer_frequencies(rotary: RopeConfig, max_model_len: int) -> tuple[Any, float]:
    """Computed on the host once for all layers that share them."""
    return frequencies(rotary, max_model_len)
