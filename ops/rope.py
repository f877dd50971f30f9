"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and the ways checkpoints stretch it.

`inverse_frequencies` reads a Hugging Face config's `rope_parameters` (older checkpoints: `rope_theta` and
`rope_scaling`) on the host, once per model; `rope` rotates inside the compiled step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""The `rope_type`s that `inverse_frequencies` knows."""


def rope(
    x: jax.Array,
    positions_T: jax.Array,
    inv_freq_h2: jax.typing.ArrayLike,
    scale: float = 1.0,
    interleaved: bool = False,
) -> jax.Array:
    """Rotates pairs of each head's channels by `position * inv_freq`.

    Args:
        x: [T, ..., h], usually x_THh; any float dtype.
        positions_T: int32 positions from 0; [A, T] where a position is A numbers (an image's patch: time, height, width).
        inv_freq_h2: float32 [r / 2] radians a position; r <= h channels are rotated, the rest pass unchanged
            (partial rotary). [A, r / 2] with A numbers a position: each channel turns by one of them, and has 0 for the others
            (Wang et al. 2024, arXiv:2409.12191). With positions of one number, that stands for all of them.
        scale: multiplies cosine and sine (YaRN's attention factor).
        interleaved: pair channels (2i, 2i + 1) as the paper and GPT-J do; else (i, i + r / 2), as Hugging Face's
            checkpoints are stored.
    Returns:
        As x, in x's dtype; computed in float32.
    """
    half = jnp.shape(inv_freq_h2)[-1]
    if 2 * half > x.shape[-1]:
        raise ValueError(
            f"rope has {half} frequencies but a head of {x.shape[-1]} channels has only half as many pairs."
        )
    cos, sin = (y.reshape(y.shape[0], *(1,) * (x.ndim - 2), half) for y in cos_sin(positions_T, inv_freq_h2, scale))
    rotated, passed = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    if interleaved:
        pairs = rotated.reshape(*rotated.shape[:-1], half, 2)
        first, second = pairs[..., 0], pairs[..., 1]
        out = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(rotated.shape)
    else:
        first, second = jnp.split(rotated, 2, axis=-1)
        out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    out = out.astype(x.dtype)
    return jnp.concatenate([out, passed], axis=-1) if passed.shape[-1] else out


def cos_sin(
    positions_T: jax.Array, inv_freq_h2: jax.typing.ArrayLike, scale: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """What `rope` multiplies by: float32 [T, r / 2] cosines and sines, times `scale`."""
    positions, inv_freq = positions_T.astype(jnp.float32), jnp.asarray(inv_freq_h2, jnp.float32)
    if positions.ndim == 1 and inv_freq.ndim > 1:
        inv_freq = inv_freq.sum(0)  # all its numbers are the same; exact for the same reason
    if positions.ndim > 1:
        angle = (positions[:, :, None] * inv_freq[:, None]).sum(0)  # exact: all but one of the terms are 0
    else:
        angle = positions[:, None] * inv_freq
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def inverse_frequencies(
    parameters: Mapping[str, Any], head_dim: int, max_position_embeddings: int | None = None
) -> tuple[np.ndarray, float]:
    """Radians a position for each pair of channels, as the checkpoint's config asks.

    Args:
        parameters: `rope_theta` (default 10000), `rope_type` (or the older `type`; default "default"),
            `partial_rotary_factor` and what its type needs:
            linear (position interpolation, Chen et al. 2023, arXiv:2306.15595): `factor`;
            llama3 (Llama 3.1's reference code): `factor`, `low_freq_factor`, `high_freq_factor`,
            `original_max_position_embeddings`;
            yarn (Peng et al. 2023, arXiv:2309.00071): `factor`, `original_max_position_embeddings`, and optionally
            `beta_fast`, `beta_slow`, `attention_factor`, `mscale`, `mscale_all_dim`, `truncate`.
        head_dim: channels of a head.
        max_position_embeddings: the model's context; YaRN's fallback when its own keys are missing.
    Returns:
        (inv_freq float32 [head_dim * partial_rotary_factor / 2], the scale for `rope`).
    Raises:
        ValueError: an unknown type, or a key that its type needs is missing.
    """
    kind = parameters.get("rope_type", parameters.get("type")) or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type {kind!r} is not supported; known are {', '.join(ROPE_TYPES)}.")
    theta = float(parameters.get("rope_theta") or 10000.0)
    dim = int(head_dim * float(parameters.get("partial_rotary_factor") or 1.0))
    # In float32 from the power on, as the checkpoints were trained: a float64 result, rounded, turns position 8192
    # up to 5e-4 radians further.
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    inv_freq = np.float32(1.0) / np.power(np.float32(theta), exponents)
    if kind == "linear":
        return (inv_freq / np.float32(_need(parameters, "factor", kind))).astype(np.float32), 1.0
    if kind == "llama3":
        return _llama3(inv_freq, parameters), 1.0
    if kind == "yarn":
        return _yarn(inv_freq, parameters, theta, dim, max_position_embeddings)
    return inv_freq, 1.0


def _need(parameters: Mapping[str, Any], key: str, kind: str) -> float:
    value = parameters.get(key)
    if value is None:
        raise ValueError(
            f"rope_type {kind!r} needs {key!r} in the config's rope_parameters, which has {dict(parameters)}."
        )
    return float(value)


def _llama3(inv_freq: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    """Long wavelengths are divided by `factor`, short ones kept; between, blended by wavelengths a context."""
    factor = _need(parameters, "factor", "llama3")
    low = _need(parameters, "low_freq_factor", "llama3")
    high = _need(parameters, "high_freq_factor", "llama3")
    context = _need(parameters, "original_max_position_embeddings", "llama3")
    wavelength = 2 * math.pi / inv_freq
    blend = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)  # 0: long wavelength, 1: short
    return ((1.0 - blend) * inv_freq / factor + blend * inv_freq).astype(np.float32)


def _yarn(
    inv_freq: np.ndarray, parameters: Mapping[str, Any], theta: float, dim: int, max_positions: int | None
) -> tuple[np.ndarray, float]:
    """Channels turning less than beta_slow times in the trained context are interpolated, over beta_fast kept."""
    context = _need(
        {"original_max_position_embeddings": max_positions, **parameters}, "original_max_position_embeddings", "yarn"
    )
    if parameters.get("factor") is None and max_positions is not None:
        factor = max_positions / context  # DeepSeek-V3's configs
    else:
        factor = _need(parameters, "factor", "yarn")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        numerator, denominator = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention_factor = mscale(numerator) / mscale(denominator) if numerator and denominator else mscale(1.0)

    def channel_turning(times: float) -> float:
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = channel_turning(float(parameters.get("beta_fast") or 32))
    high = channel_turning(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    interpolated = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    blended = inv_freq / factor * interpolated + inv_freq * (1.0 - interpolated)
    return blended.astype(np.float32), float(attention_factor)
