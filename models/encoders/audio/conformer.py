"""The conformer of Google's Universal Speech Model (Zhang et al. 2023, arXiv:2303.01037), as Gemma 3n and 4 hear with it: two
convolutions make a quarter as many rows of frames, and blocks follow of half a feed-forward step, attention among rows nearby,
a convolution over time and the other half (Gulati et al. 2020, arXiv:2005.08100). No row sees far ahead."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.encoders.bounded import Bounded
from models.encoders.vit import MASKED, VitConfig, run_block
from models.layers import Build, Linear, RMSNorm, child_recipes, weight
from models.recipes import Recipes, one, under
from ops.activation import activation

SHRINK = 4
"""Frames of a row."""
SOFTPLUS_OF_0 = float(np.log(2.0))


@dataclasses.dataclass(frozen=True)
class Conformer:
    """What these towers have besides a `VitConfig`'s numbers.

    Attributes:
        channels: of the two convolutions in front.
        ahead: frames that each of them sees behind its own place; of three, so it sees as many less before.
        cumulative: they are normalized by what there was up to each time; else each place on its own.
        norm_eps: of that.
        chunk: rows that attend together, to keys of their own chunk and around it; nothing but memory hangs on it.
        before, behind: how far a row sees: `before` rows back and `behind` ahead.
        first, count: distances that have an embedding: `first`, `first` - 1, ..., so many of them.
        k_scale: of keys.
        cap: of scores.
        taps: rows that a block's convolution sees, the last of them its own.
        share: of the residual that a feed-forward step is.
        bound: of the residual stream's numbers.
        names: of a block's parts in checkpoints.
        bounded: products are `Bounded`, whether they have bounds or not.
        layers: where blocks are in checkpoints.
    """

    channels: tuple[int, int]
    ahead: int
    cumulative: bool
    norm_eps: float
    chunk: int
    before: int
    behind: int
    first: int
    count: int
    k_scale: float
    cap: float
    taps: int
    share: float
    bound: float
    names: tuple[tuple[str, str], ...]
    bounded: bool
    layers: str

    def name(self, part: str) -> str:
        return dict(self.names)[part]


def number(said: Mapping[str, Any], name: str, default: int) -> int:
    """A whole number from 1 of audio_config. ValueError, in a sentence, for what is none."""
    found = said.get(name)
    found = default if found is None else found
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(f"config.json: audio_config.{name} is {found!r}; it must be a whole number from 1.")
    return found


def own(config: VitConfig) -> Conformer:
    """A tower's."""
    return config.get("conformer")


class Subsampling(nnx.Module):
    """Frames to rows: two convolutions of 3 x 3 over time and frequency, each in steps of two, and a product."""

    def __init__(self, config: VitConfig, build: Build):
        self.config, self.compute_dtype = config, build.compute_dtype
        first, second = own(config).channels
        self.kernels: Any = nnx.List(
            [weight((out, into, 3, 3), jnp.float32, (None,) * 4) for out, into in ((first, 1), (second, first))]
        )
        self.scales: Any = nnx.List([weight((out,), jnp.float32, (None,)) for out in (first, second)])
        bins = (config.patch_dim + 3) // 4
        self.project = Linear(bins * second, config.embed_dim, build, (None, "embed"))

    def __call__(self, frames_PX: jax.Array, count: jax.Array) -> jax.Array:
        """[P / 4, D]; rows behind those of `count` frames are arbitrary."""
        x_TFC = frames_PX.astype(jnp.float32)[:, :, None]
        behind = own(self.config).ahead
        for kernel, scale in zip(self.kernels, self.scales, strict=True):
            x_TFC = jnp.where((jnp.arange(len(x_TFC)) < count)[:, None, None], x_TFC, 0)
            x_TFC = jax.lax.conv_general_dilated(
                x_TFC[None], kernel[...], (2, 2), ((2 - behind, behind), (1, 1)), dimension_numbers=("NHWC", "OIHW", "NHWC"),
            )[0]  # fmt: skip
            x_TFC = jax.nn.relu(self._normed(x_TFC) * scale[...])
            count = (count + 1) // 2
        return self.project(x_TFC.reshape(len(x_TFC), -1).astype(self.compute_dtype))

    def _normed(self, x_TFC: jax.Array) -> jax.Array:
        settings = own(self.config)
        if not settings.cumulative:
            mean = x_TFC.mean(-1, keepdims=True)
            return (x_TFC - mean) * jax.lax.rsqrt(x_TFC.var(-1, keepdims=True) + settings.norm_eps)
        size = x_TFC[0].size * jnp.arange(1, len(x_TFC) + 1, dtype=jnp.float32)[:, None, None]

        def so_far(y_TFC: jax.Array) -> jax.Array:
            return jnp.cumsum(y_TFC.sum((1, 2), keepdims=True), axis=0) / size

        # The squares are of differences from the mean of their own time, as in transformers.
        from_mean = x_TFC - so_far(x_TFC)
        return from_mean * jax.lax.rsqrt(so_far(from_mean**2) + settings.norm_eps)

    def recipes(self, name: str, parts: tuple[str, str]) -> Recipes:
        recipes = under("project", self.project.recipes(f"{name}.input_proj_linear"))
        for index, part in enumerate(parts):
            recipes[f"kernels.{index}"] = one(f"{name}.{part}.conv.weight", *self.kernels[index].shape)
            recipes[f"scales.{index}"] = one(f"{name}.{part}.norm.weight", *self.scales[index].shape)
        return recipes


def _product(config: VitConfig, inputs: int, outputs: int, build: Build, axes: tuple[str | None, str | None]) -> Any:
    if own(config).bounded:
        return Bounded(config, (inputs, outputs), build, axes)
    return Linear(inputs, outputs, build, axes)


class NearbyAttention(nnx.Module):
    """Rows attend to those nearby, also by how far away they are (Dai et al. 2019, arXiv:1901.02860)."""

    def __init__(self, config: VitConfig, build: Build):
        D, H, h = config.embed_dim, config.num_heads, config.head_dim
        self.config, axis = config, build.axis("heads", H)
        self.q, self.k, self.v = (_product(config, D, D, build, (axis, "embed")) for _ in range(3))
        self.distance = Linear(D, D, build, (axis, "embed"))
        self.scale = weight((h,), jnp.float32, (None,))
        self.out = _product(config, D, D, build, ("embed", axis))

    def __call__(self, x_SD: jax.Array, real_S: jax.Array) -> jax.Array:
        (S, D), H, h = x_SD.shape, self.config.num_heads, self.config.head_dim
        settings = own(self.config)
        q_SHh, k_SHh, v_SHh = (each(x_SD).reshape(S, H, h).astype(jnp.float32) for each in (self.q, self.k, self.v))
        q_SHh = q_SHh * (h**-0.5 / SOFTPLUS_OF_0 * jax.nn.softplus(self.scale[...]))
        waves_FD = jnp.asarray(_waves(settings.first - np.arange(settings.count), D)).astype(x_SD.dtype)
        far_FHh = self.distance(waves_FD).reshape(-1, H, h).astype(jnp.float32)
        out_SHh = attend_nearby(q_SHh, k_SHh * settings.k_scale, v_SHh, far_FHh, real_S, settings)
        return self.out(out_SHh.reshape(S, D).astype(x_SD.dtype))

    def recipes(self, name: str) -> Recipes:
        called = own(self.config).name
        parts = {"q": "q", "k": "k", "v": "v", "distance": "distance", "out": "out"}
        recipes = child_recipes(self, {part: called(f"attn.{its}") for part, its in parts.items()}, name)
        return recipes | {"scale": one(f"{name}.{called('attn.scale')}", *self.scale.shape)}


def attend_nearby(
    q_SHh: jax.Array, k_SHh: jax.Array, v_SHh: jax.Array, far_FHh: jax.Array, real_S: jax.Array, settings: Conformer
) -> jax.Array:
    """out_SHh of rows that attend to those nearby. Rows that see none are arbitrary.

    Args:
        far_FHh: what q meets of each distance, from `settings.first` down.
        real_S: rows that are seen.
    """
    S, _, _ = q_SHh.shape
    W, before, behind = settings.chunk, settings.before, settings.behind
    U, C = -(-S // W), before + W + behind
    at_UC = np.arange(U)[:, None] * W + np.arange(C) - before
    there_UC = (at_UC >= 0) & (at_UC < S)
    at_UC = np.clip(at_UC, 0, S - 1)
    away_WC = np.arange(W)[:, None] + before - np.arange(C)  # how far back a key lies
    seen_WC = (away_WC >= -behind) & (away_WC <= before)
    index_WC = np.clip(settings.first - away_WC, 0, settings.count - 1)
    q_UWHh = jnp.pad(q_SHh, ((0, U * W - S), (0, 0), (0, 0))).reshape(U, W, *q_SHh.shape[1:])
    about_UHWF = jnp.einsum("uwhd,fhd->uhwf", q_UWHh, far_FHh)
    scores = jnp.einsum("uwhd,uchd->uhwc", q_UWHh, k_SHh[at_UC])
    scores = scores + about_UHWF[:, :, np.arange(W)[:, None], index_WC]
    scores = settings.cap * jnp.tanh(scores / settings.cap)
    seen = (real_S[at_UC] & there_UC)[:, None, None, :] & seen_WC
    weights = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1)
    return jnp.einsum("uhwc,uchd->uwhd", weights, v_SHh[at_UC]).reshape(U * W, *q_SHh.shape[1:])[:S]


def _waves(places_F: np.ndarray, width: int) -> np.ndarray:
    """float32 [F, width]: sines, then cosines, over wavelengths up to 10,000."""
    half = width // 2
    inverse = np.exp(np.arange(half, dtype=np.float32) * np.float32(-np.log(1e4) / max(half - 1, 1))).astype(np.float32)
    turns = places_F.astype(np.float32)[:, None] * inverse
    return np.concatenate([np.sin(turns), np.cos(turns)], axis=1)


class HalfStep(nnx.Module):
    """x + share * norm(down(act(up(norm(x)))))."""

    def __init__(self, config: VitConfig, build: Build):
        D, F, axis = config.embed_dim, config.ffw_dim, build.axis("ffw", config.ffw_dim)
        self.config = config
        self.pre_norm, self.post_norm = RMSNorm(D, 1e-6), RMSNorm(D, 1e-6)
        self.up = _product(config, D, F, build, (axis, "embed"))
        self.down = _product(config, F, D, build, ("embed", axis))

    def __call__(self, x_SD: jax.Array) -> jax.Array:
        bound, act = own(self.config).bound, activation(self.config.activation)
        y_SD = self.down(act(self.up(self.pre_norm(jnp.clip(x_SD, -bound, bound)))))
        return x_SD + self.post_norm(jnp.clip(y_SD, -bound, bound)) * own(self.config).share

    def recipes(self, name: str) -> Recipes:
        names = {
            "pre_norm": "pre_layer_norm",
            "post_norm": "post_layer_norm",
            "up": "ffw_layer_1",
            "down": "ffw_layer_2",
        }
        return child_recipes(self, names, name)


class LightConvolution(nnx.Module):
    """x + end(act(norm(each channel's last rows, weighed)))."""

    def __init__(self, config: VitConfig, build: Build):
        D, eps = config.embed_dim, config.norm_eps
        self.config, self.pre_norm, self.norm = config, RMSNorm(D, eps), RMSNorm(D, eps)
        self.start, self.end = (_product(config, D, O, build, (None, "embed")) for O in (2 * D, D))
        self.taps = weight((D, own(config).taps), jnp.float32, (None, None))

    def __call__(self, x_SD: jax.Array) -> jax.Array:
        settings, S = own(self.config), len(x_SD)
        y_SD, gate_SD = jnp.split(self.start(self.pre_norm(x_SD)), 2, axis=-1)
        y_SD = jnp.pad(y_SD * jax.nn.sigmoid(gate_SD), ((settings.taps - 1, 0), (0, 0)))
        taps_DK = self.taps[...].astype(y_SD.dtype)
        y_SD = jnp.stack([taps_DK[:, k] * y_SD[k : k + S] for k in range(settings.taps)]).sum(0)
        y_SD = self.norm(jnp.clip(y_SD, -settings.bound, settings.bound))
        return x_SD + self.end(activation(self.config.activation)(y_SD))

    def recipes(self, name: str) -> Recipes:
        names = {"pre_norm": "pre_layer_norm", "norm": "conv_norm", "start": "linear_start", "end": "linear_end"}
        D, K = self.taps.shape
        return child_recipes(self, names, name) | {"taps": one(f"{name}.depthwise_conv1d.weight", D, 1, K)}


class ConformerBlock(nnx.Module):
    def __init__(self, config: VitConfig, build: Build):
        self.config = config
        self.start, self.finish = HalfStep(config, build), HalfStep(config, build)
        self.attn, self.convolution = NearbyAttention(config, build), LightConvolution(config, build)
        self.attn_norm, self.attn_out_norm, self.norm = (RMSNorm(config.embed_dim, 1e-6) for _ in range(3))

    def __call__(self, x_SD: jax.Array, real_S: jax.Array) -> jax.Array:
        bound = own(self.config).bound
        x_SD = self.start(x_SD)
        y_SD = self.attn(self.attn_norm(jnp.clip(x_SD, -bound, bound)), real_S)
        x_SD = x_SD + self.attn_out_norm(jnp.clip(y_SD, -bound, bound))
        x_SD = self.finish(self.convolution(x_SD))
        return self.norm(jnp.clip(x_SD, -bound, bound))

    def recipes(self, name: str) -> Recipes:
        parts = ("start", "finish", "attn", "convolution", "attn_norm", "attn_out_norm", "norm")
        return child_recipes(self, {part: own(self.config).name(part) for part in parts}, name)


class ConformerTrunk(nnx.Module):
    """Frames of a spectrogram through the convolutions and the blocks."""

    def __init__(self, config: VitConfig, build: Build):
        self.config, self.compute_dtype = config, build.compute_dtype
        self.rows = Subsampling(config, build)
        self.blocks: Any = nnx.List([ConformerBlock(config, build) for _ in range(config.num_layers)])

    def hear(self, frames_PX: jax.Array, count: jax.Array) -> jax.Array:
        """[P / 4, D]; rows behind those of `count` frames are arbitrary."""
        x_SD = self.rows(frames_PX, count).astype(self.compute_dtype)
        real_S = jnp.arange(len(x_SD)) < (count + SHRINK - 1) // SHRINK
        for block in self.blocks:
            x_SD = run_block(block, x_SD, real_S)
        return x_SD

    def trunk_recipes(self, parts: tuple[str, str]) -> Recipes:
        """`parts`: names of the two convolutions."""
        recipes = under("rows", self.rows.recipes("audio_tower.subsample_conv_projection", parts))
        for index, block in enumerate(self.blocks):
            recipes |= under(f"blocks.{index}", block.recipes(f"audio_tower.{own(self.config).layers}.{index}"))
        return recipes
