"""What Granite Speech (IBM 2025, arXiv:2505.08699) hears with: a conformer (Gulati et al. 2020, arXiv:2005.08100) that was trained
to write letters, and of each 15 rows three queries' answers (a Q-Former: Li et al. 2023, arXiv:2301.12597)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.encoders.vit import MASKED, VitConfig, run_block
from models.layers import Build, LayerNorm, Linear, child_recipes, weight
from models.recipes import Recipes, deal, one, pieces, split, under
from ops.activation import activation

LONGEST = 15_000
"""Rows of a sound at most, 20 ms each."""
BATCH_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class GraniteEars:
    """What this tower has besides a `VitConfig`'s numbers.

    Attributes:
        context: rows that see each other, and nothing else.
        distances: up to which rows' distance has an embedding.
        letters: that the layer in the middle guesses.
        taps, inner: rows that a block's convolution sees, and its channels.
        window, queries: rows that are asked together, and by how many queries.
        width, heads, ffw, layers, every, activation, norm_eps: of what asks; every so many layers look at the rows.
        scale: of what comes out, as of the decoder's own embeddings.
    """

    context: int
    distances: int
    letters: int
    taps: int
    inner: int
    window: int
    queries: int
    width: int
    heads: int
    ffw: int
    layers: int
    every: int
    activation: str
    norm_eps: float
    scale: float


def granite_speech(hf: Mapping[str, Any]) -> VitConfig:
    """Of config.json's encoder_config and projector_config."""
    parts = [hf.get("encoder_config"), hf.get("projector_config")]
    if not all(isinstance(part, Mapping) for part in parts):
        raise ValueError("config.json has no encoder_config and projector_config: the encoder's sizes are not known.")
    said, asks = (dict(part or {}) for part in parts)
    width, heads = said.get("hidden_dim", 1024), said.get("num_heads", 8)
    window, rate = hf.get("window_size", 15), hf.get("downsample_rate", 5)
    if (said.get("dim_head") or width // heads) * heads != width:
        raise ValueError("config.json: encoder_config: heads that are not the width are not served.")
    if asks.get("model_type", "blip_2_qformer") != "blip_2_qformer" or asks.get("encoder_hidden_size", 1408) != width:
        raise ValueError(
            "config.json: projector_config is no blip_2_qformer of the encoder's rows; no other is served."
        )
    if not isinstance(window, int) or not isinstance(rate, int) or not 1 <= rate <= window or window % rate:
        raise ValueError(
            f"config.json: window_size is {window!r} and downsample_rate {rate!r}; one is a part of the other."
        )
    ears = GraniteEars(
        context=said.get("context_size", 200),
        distances=said.get("max_pos_emb", 512),
        letters=said.get("output_dim", 42),
        taps=said.get("conv_kernel_size", 15),
        inner=width * said.get("conv_expansion_factor", 2),
        window=window,
        queries=window // rate,
        width=asks.get("hidden_size", 768),
        heads=asks.get("num_attention_heads", 12),
        ffw=asks.get("intermediate_size", 3072),
        layers=asks.get("num_hidden_layers", 12),
        every=asks.get("cross_attention_frequency", 2),
        activation=asks.get("hidden_act", "gelu"),
        norm_eps=asks.get("layer_norm_eps", 1e-12),
        scale=float(hf.get("embedding_multiplier", 1.0)),
    )
    return VitConfig(
        num_layers=said.get("num_layers", 10),
        embed_dim=width,
        ffw_dim=width * said.get("feedforward_mult", 4),
        num_heads=heads,
        patch_dim=said.get("input_dim", 160),
        out_dim=hf["hidden_size"],
        max_patches=-(-LONGEST // window) * window,
        norm_eps=1e-5,
        activation="silu",
        extra=(("ears", ears), ("per", rate), ("chunk", window), ("frame_s", 0.02)),
    )


class HalfStep(nnx.Module):
    """down(act(up(norm(x)))) / 2."""

    def __init__(self, config: VitConfig, build: Build):
        D, F, axis = config.embed_dim, config.ffw_dim, build.axis("ffw", config.ffw_dim)
        self.norm = LayerNorm(D, config.norm_eps)
        self.up = Linear(D, F, build, (axis, "embed"), bias=True)
        self.down = Linear(F, D, build, ("embed", axis), bias=True)

    def __call__(self, x_SD: jax.Array) -> jax.Array:
        return 0.5 * self.down(jax.nn.silu(self.up(self.norm(x_SD))))

    def recipes(self, name: str) -> Recipes:
        return child_recipes(self, {"norm": "pre_norm", "up": "up_proj", "down": "down_proj"}, name)


class ContextAttention(nnx.Module):
    """Rows of one context see each other, also by how far apart they are (Shaw et al. 2018, arXiv:1803.02155)."""

    def __init__(self, config: VitConfig, build: Build):
        D, H, ears = config.embed_dim, config.num_heads, config.get("ears")
        axis = build.axis("heads", H)
        self.heads, self.context = (H, config.head_dim), ears.context
        self.norm = LayerNorm(D, config.norm_eps)
        self.qkv = Linear(D, 3 * D, build, (axis, "embed"))
        self.out = Linear(D, D, build, ("embed", axis), bias=True)
        self.distance = weight((2 * ears.distances + 1, config.head_dim), jnp.float32, (None, None))
        self.middle = ears.distances

    def __call__(self, x_SD: jax.Array, real_S: jax.Array) -> jax.Array:
        (S, D), (H, h), W = x_SD.shape, self.heads, self.context
        U = -(-S // W)
        qkv_SH3h = jnp.pad(self.qkv(self.norm(x_SD)), ((0, U * W - S), (0, 0))).reshape(U, W, H, 3, h)
        q_UWHh, k_UWHh, v_UWHh = jnp.moveaxis(qkv_SH3h, 3, 0)
        real_UW = jnp.pad(real_S, (0, U * W - S)).reshape(U, W)
        away_WW = np.arange(W)[:, None] - np.arange(W) + self.middle

        def attend(block: tuple[jax.Array, ...]) -> jax.Array:
            q_WHh, k_WHh, v_WHh, real_W = block
            scores = jnp.einsum("whd,chd->hwc", q_WHh, k_WHh, preferred_element_type=jnp.float32)
            about = jnp.einsum("whd,wcd->hwc", q_WHh.astype(jnp.float32), self.distance[...][away_WW])
            weights = jax.nn.softmax(jnp.where(real_W, (scores + about) * h**-0.5, MASKED), axis=-1)
            return jnp.einsum("hwc,chd->whd", weights.astype(v_WHh.dtype), v_WHh)

        out_UWHh = jax.lax.map(attend, (q_UWHh, k_UWHh, v_UWHh, real_UW))
        return self.out(out_UWHh.reshape(U * W, D)[:S].astype(x_SD.dtype))

    def recipes(self, name: str) -> Recipes:
        H, D = self.heads[0], self.heads[0] * self.heads[1]
        recipes = child_recipes(self, {"norm": "pre_norm", "out": "to_out"}, name)
        k, v = split(one(f"{name}.to_kv.weight", 2 * D, D), D, D)
        recipes["qkv.weight"] = deal(H, one(f"{name}.to_q.weight", D, D), k, v)
        return recipes | {"distance": one(f"{name}.rel_pos_emb.weight", *self.distance.shape)}


class Convolution(nnx.Module):
    """down(act(norm(each channel's rows around, weighed))); the norm's numbers are the training's."""

    def __init__(self, config: VitConfig, build: Build):
        D, ears = config.embed_dim, config.get("ears")
        inner, self.taps = ears.inner, ears.taps
        self.norm = LayerNorm(D, config.norm_eps)
        self.up = Linear(D, 2 * inner, build, (None, "embed"), bias=True)
        self.kernel = weight((inner, ears.taps), jnp.float32, (None, None))
        self.batch: Any = nnx.List([weight((inner,), jnp.float32, (None,)) for _ in range(4)])
        self.down = Linear(inner, D, build, ("embed", None), bias=True)

    def __call__(self, x_SD: jax.Array, real_S: jax.Array) -> jax.Array:
        S, K = len(x_SD), self.taps
        y_SI, gate_SI = jnp.split(self.up(self.norm(x_SD)), 2, axis=-1)
        y_SI = jnp.where(real_S[:, None], y_SI * jax.nn.sigmoid(gate_SI), 0)
        before = K // 2
        y_SI = jnp.pad(y_SI, ((before, K - 1 - before), (0, 0)))
        kernel_IK = self.kernel[...].astype(y_SI.dtype)
        y_SI = jnp.stack([kernel_IK[:, k] * y_SI[k : k + S] for k in range(K)]).sum(0)
        scale, bias, mean, variance = (part[...] for part in self.batch)
        factor = scale * jax.lax.rsqrt(variance + BATCH_EPS)
        return self.down(jax.nn.silu(y_SI * factor.astype(y_SI.dtype) + (bias - mean * factor).astype(y_SI.dtype)))

    def recipes(self, name: str) -> Recipes:
        (inner, K), (D, _) = self.kernel.shape, self.down.weight.stored_shape
        recipes: Recipes = under("norm", self.norm.recipes(f"{name}.norm")) | {
            "up.weight": one(f"{name}.up_conv.weight", 2 * inner, D, 1),
            "up.bias": one(f"{name}.up_conv.bias", 2 * inner),
            "kernel": one(f"{name}.depth_conv.conv.weight", inner, 1, K),
            "down.weight": one(f"{name}.down_conv.weight", D, inner, 1),
            "down.bias": one(f"{name}.down_conv.bias", D),
        }
        for index, part in enumerate(("weight", "bias", "running_mean", "running_var")):
            recipes[f"batch.{index}"] = one(f"{name}.batch_norm.{part}", inner)
        return recipes


class GraniteBlock(nnx.Module):
    def __init__(self, config: VitConfig, build: Build):
        self.start, self.finish = HalfStep(config, build), HalfStep(config, build)
        self.attn, self.convolution = ContextAttention(config, build), Convolution(config, build)
        self.norm = LayerNorm(config.embed_dim, config.norm_eps)

    def __call__(self, x_SD: jax.Array, real_S: jax.Array) -> jax.Array:
        x_SD = x_SD + self.start(x_SD)
        x_SD = x_SD + self.attn(x_SD, real_S)
        x_SD = x_SD + self.convolution(x_SD, real_S)
        return self.norm(x_SD + self.finish(x_SD))

    def recipes(self, name: str) -> Recipes:
        names = {"start": "ff1", "finish": "ff2", "attn": "attn", "convolution": "conv", "norm": "post_norm"}
        return child_recipes(self, names, name)


class Asking(nnx.Module):
    """norm(x + out(attention of x to rows)), with biases, as in BERT. `inputs`: width of the rows."""

    def __init__(self, ears: GraniteEars, inputs: int, build: Build):
        D, axis = ears.width, build.axis("heads", ears.heads)
        self.heads = ears.heads
        self.q = Linear(D, D, build, (axis, "embed"), bias=True)
        self.kv = Linear(inputs, 2 * D, build, (axis, "embed"), bias=True)
        self.out = Linear(D, D, build, ("embed", axis), bias=True)
        self.norm = LayerNorm(D, ears.norm_eps)

    def __call__(self, x_NQD: jax.Array, rows_NWI: jax.Array) -> jax.Array:
        (N, Q, D), W, H = x_NQD.shape, rows_NWI.shape[1], self.heads
        q_NQHh = self.q(x_NQD.reshape(N * Q, D)).reshape(N, Q, H, -1)
        kv = self.kv(rows_NWI.reshape(N * W, -1)).reshape(N, W, H, 2, -1)
        scores = jnp.einsum("nqhd,nwhd->nhqw", q_NQHh, kv[..., 0, :], preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * (D // H) ** -0.5, axis=-1).astype(x_NQD.dtype)
        out_TD = jnp.einsum("nhqw,nwhd->nqhd", weights, kv[..., 1, :]).reshape(N * Q, D)
        return self.norm(x_NQD + self.out(out_TD).reshape(N, Q, D))

    def recipes(self, name: str) -> Recipes:
        (D, _), (_, I) = self.q.weight.stored_shape, self.kv.weight.stored_shape
        names = {"q": "attention.query", "out": "output.dense", "norm": "output.LayerNorm"}
        both = [f"{name}.attention.{part}" for part in ("key", "value")]
        return child_recipes(self, names, name) | {
            "kv.weight": deal(self.heads, *pieces([f"{part}.weight" for part in both], *((D, I),) * 2)),
            "kv.bias": deal(self.heads, *pieces([f"{part}.bias" for part in both], *((D,),) * 2)),
        }


class AskingLayer(nnx.Module):
    """Queries look at each other, then, in some layers, at the rows, and think."""

    def __init__(self, ears: GraniteEars, layer: int, inputs: int, build: Build):
        D, F, axis = ears.width, ears.ffw, build.axis("ffw", ears.ffw)
        self.activation = ears.activation
        self.own = Asking(ears, D, build)
        self.rows = None if layer % ears.every else Asking(ears, inputs, build)
        self.up = Linear(D, F, build, (axis, "embed"), bias=True)
        self.down = Linear(F, D, build, ("embed", axis), bias=True)
        self.norm = LayerNorm(D, ears.norm_eps)

    def __call__(self, x_NQD: jax.Array, rows_NWI: jax.Array) -> jax.Array:
        x_NQD = self.own(x_NQD, x_NQD)
        x_NQD = x_NQD if self.rows is None else self.rows(x_NQD, rows_NWI)
        x_TD = x_NQD.reshape(-1, x_NQD.shape[-1])
        return self.norm(x_TD + self.down(activation(self.activation)(self.up(x_TD)))).reshape(x_NQD.shape)

    def recipes(self, name: str) -> Recipes:
        names = {"own": "attention", "up": "intermediate_query.dense", "down": "output_query.dense"}
        names |= {"norm": "output_query.LayerNorm"} | ({} if self.rows is None else {"rows": "crossattention"})
        return child_recipes(self, names, name)


class GraniteSpeech(nnx.Module):
    """`models.api.ImageEncoder` whose patches are pairs of frames of a log-mel spectrogram."""

    def __init__(self, config: VitConfig, build: Build):
        self.config, self.compute_dtype = config, build.compute_dtype
        D, ears = config.embed_dim, config.get("ears")
        self.patch = Linear(config.patch_dim, D, build, (None, "embed"), bias=True)
        self.blocks: Any = nnx.List([GraniteBlock(config, build) for _ in range(config.num_layers)])
        self.letters = Linear(D, ears.letters, build, (None, "embed"), bias=True)
        self.of_letters = Linear(ears.letters, D, build, ("embed", None), bias=True)
        self.queries = weight((ears.queries, ears.width), jnp.float32, (None, None))
        self.queries_norm = LayerNorm(ears.width, ears.norm_eps)
        self.asking: Any = nnx.List([AskingLayer(ears, layer, D, build) for layer in range(ears.layers)])
        self.project = Linear(ears.width, config.out_dim, build, (None, "embed"), bias=True)

    def encode(self, patches_PX: jax.Array, place_P2: jax.Array, count: jax.Array) -> jax.Array:
        config, ears = self.config, self.config.get("ears")
        x_SD = self.patch(patches_PX.astype(self.compute_dtype))
        real_S = jnp.arange(len(x_SD)) < count
        for index, block in enumerate(self.blocks, start=1):
            x_SD = run_block(block, x_SD, real_S)
            if index == config.num_layers // 2:
                guessed_SL = jax.nn.softmax(self.letters(x_SD, out_dtype=jnp.float32), axis=-1)
                x_SD = x_SD + self.of_letters(guessed_SL.astype(x_SD.dtype))
        rows_NWD = jnp.where(real_S[:, None], x_SD, 0).reshape(-1, ears.window, config.embed_dim)
        queries_QD = self.queries_norm(self.queries[...]).astype(x_SD.dtype)
        x_NQD = jnp.broadcast_to(queries_QD, (len(rows_NWD), *queries_QD.shape))
        for layer in self.asking:
            x_NQD = run_block(layer, x_NQD, rows_NWD)
        return self.project(x_NQD.reshape(-1, ears.width)) * ears.scale

    @property
    def unused(self) -> tuple[str, ...]:
        """Regular expressions for tensors that are not read."""
        return (r"\.batch_norm\.num_batches_tracked$",)

    def recipes(self) -> Recipes:
        encoder, projector = "model.encoder", "model.projector"
        names = {"patch": f"{encoder}.input_linear", "letters": f"{encoder}.out", "of_letters": f"{encoder}.out_mid"}
        names |= {"queries_norm": f"{projector}.qformer.layernorm", "project": f"{projector}.linear"}
        recipes = child_recipes(self, names, "") | {"queries": one(f"{projector}.query", 1, *self.queries.shape)}
        for index, block in enumerate(self.blocks):
            recipes |= under(f"blocks.{index}", block.recipes(f"{encoder}.layers.{index}"))
        for index, layer in enumerate(self.asking):
            recipes |= under(f"asking.{index}", layer.recipes(f"{projector}.qformer.encoder.layer.{index}"))
        return recipes
