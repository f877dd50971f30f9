"""Whisper's encoder (Radford et al. 2022, arXiv:2212.04356): 30 seconds of sound to what the decoder's layers attend to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.encoders.vit import VitBlock, VitConfig, run_block
from models.layers import Build, LayerNorm, Linear, taken, weight
from models.recipes import Computed, Recipe, Recipes, deal, one, pieces, under
from ops.paged_attention import whole

TAPS = 3
"""Frames that a convolution sees."""


def whisper_encoder(hf: Mapping[str, Any]) -> VitConfig:
    D, positions = hf["d_model"], hf.get("max_source_positions", 1500)
    heads, layers = hf["decoder_attention_heads"], hf["decoder_layers"]
    return VitConfig(
        num_layers=hf["encoder_layers"],
        embed_dim=D,
        ffw_dim=hf["encoder_ffn_dim"],
        num_heads=hf["encoder_attention_heads"],
        patch_dim=hf.get("num_mel_bins", 80),
        out_dim=layers * 2 * D * positions,
        max_patches=2 * positions,
        norm_eps=1e-5,
        activation=hf.get("activation_function", "gelu"),
        extra=(("layers", layers), ("heads", heads), ("positions", positions)),
    )


def without_k(q: Recipe, v: Recipe) -> tuple[Recipe, Recipe, Recipe]:
    """Biases of q, k and v where k has none."""
    return q, Computed((q,), np.zeros_like), v


def in_pages(config: VitConfig) -> VitConfig:
    """The encoder that makes pages, as the CPU's kernels read them."""
    heads, layers, positions = (config.get(name) for name in ("heads", "layers", "positions"))
    width = layers * whole.kept_size(positions, heads, config.embed_dim // heads)
    return dataclasses.replace(config, out_dim=width, extra=(*config.extra, ("paged", True)))


class WhisperBlock(VitBlock):
    attention_names: ClassVar[tuple[tuple[str, ...], str]] = (("q_proj", "k_proj", "v_proj"), "out_proj")

    def recipes(self, name: str) -> Recipes:
        recipes: Recipes = {}
        for part, own in (
            ("attn_norm", "self_attn_layer_norm"),
            ("attn", "self_attn"),
            ("mlp_norm", "final_layer_norm"),
        ):
            recipes |= under(part, getattr(self, part).recipes(f"{name}.{own}"))
        H, h = self.attn.heads
        biases = pieces([f"{name}.self_attn.{part}_proj.bias" for part in "qv"], *((H * h,),) * 2)
        recipes["attn.qkv.bias"] = deal(H, *without_k(*biases))
        return recipes | under("mlp", self.mlp.recipes(name))


class SoundTrunk(nnx.Module):
    """Frames of a log-mel spectrogram through two convolutions, of which the second halves them, and the blocks."""

    def __init__(self, config: VitConfig, build: Build):
        self.config, self.compute_dtype = config, build.compute_dtype
        D, mels = config.embed_dim, config.patch_dim
        self.patch = Linear(TAPS * mels, D, build, (None, "embed"), bias=True)
        self.halve = Linear(TAPS * D, D, build, (None, "embed"), bias=True)
        made = config.get("made_positions")
        self.positions = None if made else weight((config.get("positions"), D), jnp.float32, (None, "embed"))
        self.blocks: Any = nnx.List([WhisperBlock(config, layer, build) for layer in range(config.num_layers)])
        self.norm = LayerNorm(D, config.norm_eps)

    def hear(
        self,
        frames_PX: jax.Array,
        place_P2: jax.Array,
        real_S: jax.Array | None = None,
        there_P: jax.Array | None = None,
    ) -> jax.Array:
        """[S, D] before the last norm, S the lesser of half the frames and the positions that there are.

        Args:
            real_S: those that are attended to, which come first; None for all.
            there_P: frames that are there; behind them is nothing, for both convolutions. None for all.
        """
        act = self.config.activation
        chunk = self.config.get("chunk") or len(frames_PX)
        x_PD = self.patch(_seen(frames_PX.astype(self.compute_dtype), 1, chunk), activation=act)
        x_PD = x_PD if there_P is None else jnp.where(there_P[:, None], x_PD, 0)
        x_SD = self.halve(_seen(x_PD, 2, chunk), activation=act)[: self.config.get("positions")]
        x_SD = x_SD + self._places(len(x_SD), chunk // 2).astype(x_SD.dtype)
        real_S = jnp.ones(len(x_SD), bool) if real_S is None else real_S[: len(x_SD)]
        for block in self.blocks:
            x_SD = run_block(block, x_SD, place_P2[: len(x_SD)], real_S)
        return x_SD

    def _places(self, rows: int, chunk: int) -> jax.Array:
        """[rows, D]: what says where a row is; in chunks of so many, each from the first place on."""
        if self.positions is not None:
            return self.positions[...][:rows]
        return jnp.asarray(np.tile(_sinusoids(chunk, self.config.embed_dim), (-(-rows // chunk), 1))[:rows])

    def trunk_recipes(self, name: str, norm: str = "layer_norm") -> Recipes:
        """Of all that is here; `name` is the encoder's, `norm` its last norm's."""
        D, mels = self.config.embed_dim, self.config.patch_dim
        recipes: Recipes = {
            "patch.weight": one(f"{name}.conv1.weight", D, mels, TAPS),
            "patch.bias": one(f"{name}.conv1.bias", D),
            "halve.weight": one(f"{name}.conv2.weight", D, D, TAPS),
            "halve.bias": one(f"{name}.conv2.bias", D),
        }
        if self.positions is not None:
            recipes["positions"] = one(f"{name}.embed_positions.weight", *self.positions.shape)
        for index, block in enumerate(self.blocks):
            recipes |= under(f"blocks.{index}", block.recipes(f"{name}.layers.{index}"))
        return recipes | under("norm", self.norm.recipes(f"{name}.{norm}"))


class WhisperEncoder(SoundTrunk):
    """`models.api.ImageEncoder` whose patches are the frames of a log-mel spectrogram, all of them real. It makes one row of
    numbers, [L, K and V, H, positions, h] of the decoder's layers (or `in_pages`, what `ops.paged_attention.whole` keeps of each):
    they attend to nothing else of the sound."""

    def __init__(self, config: VitConfig, build: Build):
        super().__init__(config, build)
        D, axis = config.embed_dim, build.axis("heads", config.get("heads"))
        self.cross: Any = nnx.List(
            [Linear(D, 2 * D, build, (axis, "embed"), bias=True) for _ in range(config.get("layers"))]
        )

    def encode(self, patches_PX: jax.Array, place_P2: jax.Array, count: jax.Array) -> jax.Array:
        x_SD, H = self.hear(patches_PX, place_P2), self.config.get("heads")
        if self.config.get("paged"):
            weights, biases = zip(*((one.weight.get_value(), one.bias_value()) for one in self.cross), strict=True)
            return whole.keep_products(x_SD, weights, biases, H, taken(self.norm))[None]
        x_SD = self.norm(x_SD)
        kept = [linear(x_SD).reshape(len(x_SD), H, 2, -1).transpose(2, 1, 0, 3).reshape(-1) for linear in self.cross]
        return jnp.concatenate(kept)[None]

    def recipes(self) -> Recipes:
        D, H = self.config.embed_dim, self.config.get("heads")
        recipes = self.trunk_recipes("model.encoder")
        for index in range(len(self.cross)):
            other = f"model.decoder.layers.{index}.encoder_attn"
            k, v = pieces([f"{other}.{part}_proj.weight" for part in "kv"], (D, D), (D, D))
            bias = one(f"{other}.v_proj.bias", D)
            recipes[f"cross.{index}.weight"] = deal(H, k, v)
            recipes[f"cross.{index}.bias"] = deal(H, Computed((bias,), np.zeros_like), bias)
        return recipes


def _seen(x_TD: jax.Array, step: int, chunk: int) -> jax.Array:
    """[T / step, D * TAPS]: of every `step`-th frame what a convolution sees: the one before, itself, the one behind; nothing of
    other chunks of so many frames."""
    (T, D), count = x_TD.shape, chunk // step
    padded = jnp.pad(x_TD.reshape(T // chunk, chunk, D), ((0, 0), (1, 1), (0, 0)))
    taps = [padded[:, tap : tap + step * (count - 1) + 1 : step] for tap in range(TAPS)]
    return jnp.stack(taps, axis=-1).reshape(T // step, -1)


def _sinusoids(rows: int, width: int) -> np.ndarray:
    """float32 [rows, width]: sines, then cosines, of the place over wavelengths up to 10,000 (arXiv:1706.03762)."""
    inverse = np.exp(-np.log(10000.0) / (width // 2 - 1) * np.arange(width // 2, dtype=np.float32)).astype(np.float32)
    turns = np.arange(rows, dtype=np.float32)[:, None] * inverse
    return np.concatenate([np.sin(turns), np.cos(turns)], axis=1)
