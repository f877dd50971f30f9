"""Dense weights rounded to four, six or eight bits in blocks, on the host.

Four bits are GGUF's Q4_K by another search: 4.5 bits a weight with scales and offsets of six bits for every 32 inputs. Six bits are
6.5 with a scale for every 32 inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ops.linear.weights.block_pack import GGUF, CodedRows, pack, stretches_of
from ops.linear.weights.blocks import NEST, STEP, BlockWeight, Form
from ops.linear.weights.rotation import BLOCK, rotate

FOUR_BITS = 12
"""What `four_bits` makes, by GGUF's number: 4.5 bits a weight, with scales and offsets of six bits for every 32 inputs."""

SIX_BITS = Form(6, zero=32)
"""What the finer rows become: 6.5 bits a weight."""

SHRUNK = (0.0, 0.07, 0.14)
"""Parts of a block's range, half of them at either end, that `four_bits` tries to leave out."""

REFITS = 2
"""Times that scale and offset are fitted to the values they lead to."""


Finer = tuple[int, int]
"""(block, first): of every `block` rows those from `first` on get six bits; both are whole panels, or (1, 0) for all rows."""


def four_bits(
    weight_OI: np.ndarray, empty: Callable[[tuple[int, ...], Any], np.ndarray] = np.empty, finer: Finer | None = None
) -> BlockWeight:
    """A dense weight rounded to four bits, of numpy arrays; rotated where its inputs are whole blocks of 64.

    Each block of 32 inputs gets the scale and the offset, of a few, that leave the least squared error: of Whisper's decoder 5.0e-3
    of the weights' squares, where llama.cpp's Q4_K leaves 5.9e-3 in as many bits, and a scale alone 6.8e-3.

    Args:
        weight_OI: of any float dtype.
        empty: (shape, dtype) -> where the result goes.
        finer: which rows get six bits; None for none.
    """
    O, I = weight_OI.shape
    rotated, finer_R = I % BLOCK == 0, finer_rows(O, finer)
    count = int(finer_R.sum())
    place_R = np.where(finer_R, np.cumsum(finer_R), np.cumsum(~finer_R)) - 1
    four_RB = np.empty((O - count, -(-I // NEST) * 144), np.uint8)
    six_RI, scale_RG = np.empty((count, I), np.uint8), np.empty((count, -(-I // STEP)), np.float16)
    for is_six in (False, True):
        rows = np.flatnonzero(finer_R == is_six)
        for first in range(0, len(rows), ROWS):
            to = slice(first, first + ROWS)
            part = jnp.asarray(np.asarray(weight_OI[rows[to]], np.float32))
            if is_six:
                values_RI, scale_RG[to] = _rounded_to_six(part, rotated)
                six_RI[to] = np.asarray(values_RI)[:, :I]
            else:
                four_RB[to] = _as_q4_k(*_rounded_to_four(part, rotated))
    tensors = [CodedRows(GGUF[FOUR_BITS][1], I, four_RB, FOUR_BITS), CodedRows(SIX_BITS, I, six_RI, scale_RG=scale_RG)]
    return pack(tensors, finer_R.astype(np.int64), place_R, empty, rotated)


def four_bits_like(shape: tuple[int, int], finer: Finer | None = None) -> BlockWeight:
    """What `four_bits` makes of a weight [O, I], of an array without values."""
    forms = [GGUF[FOUR_BITS][1], SIX_BITS]
    stretches, _, size = stretches_of(forms, finer_rows(shape[0], finer).astype(np.int64), shape[1])
    bytes_N: Any = jax.ShapeDtypeStruct((size,), np.uint8)
    return BlockWeight(bytes_N, shape, tuple(stretches), shape[1] % BLOCK == 0)


def finer_rows(rows: int, finer: Finer | None) -> np.ndarray:
    """bool [rows]: which of a weight's rows get six bits."""
    if finer is None:
        return np.zeros(rows, bool)
    block, first = finer
    return np.arange(rows) % block >= first


EIGHT_BITS = Form(8, zero=128)


def eight_bits(weight_OI: np.ndarray, empty: Callable[[tuple[int, ...], Any], np.ndarray] = np.empty) -> BlockWeight:
    """A dense weight rounded to eight bits with a float16 scale for every 32 inputs, as GGUF's Q8_0 has it, of numpy arrays.

    Args:
        weight_OI: of any float dtype.
        empty: (shape, dtype) -> where the result goes.
    """
    O, I = weight_OI.shape
    rows_RB, scale_RG = np.empty((O, I), np.uint8), np.empty((O, -(-I // STEP)), np.float16)
    for first in range(0, O, ROWS):
        rows = slice(first, min(O, first + ROWS))
        x_RGi = np.pad(np.asarray(weight_OI[rows], np.float32), ((0, 0), (0, -I % STEP))).reshape(
            -1, *scale_RG.shape[1:], STEP
        )
        scale_RG[rows] = np.abs(x_RGi).max(-1) / 127
        scale_RG1 = scale_RG[rows].astype(np.float32)[..., None]
        values_RGi = np.rint(x_RGi / np.where(scale_RG1 > 0, scale_RG1, 1)).clip(-128, 127) + 128
        rows_RB[rows] = values_RGi.reshape(len(x_RGi), -1)[:, :I]
    coded = CodedRows(EIGHT_BITS, I, rows_RB, scale_RG=scale_RG)
    return pack([coded], np.zeros(O, np.int64), np.arange(O), empty)


ROWS = 1024  # rounded at once


@functools.partial(jax.jit, static_argnums=1)
def _rounded_to_four(weight_OI: jax.Array, rotated: bool) -> tuple[jax.Array, ...]:
    """Values uint8 [O, N, 8, 32], scales and offsets uint8 [O, N, 8], and what they are times, float16 [O, N]: w = s v - o."""
    (O, I), groups = weight_OI.shape, NEST // STEP
    weight_OI = rotate(weight_OI) if rotated else weight_OI
    x_ONgi = jnp.pad(weight_OI, ((0, 0), (0, -I % NEST))).reshape(O, -1, groups, STEP)
    low_ONg, high_ONg = jnp.minimum(x_ONgi.min(-1), 0), jnp.maximum(x_ONgi.max(-1), 0)
    mean_ONg = x_ONgi.mean(-1)

    def values(scale_ONg: jax.Array, offset_ONg: jax.Array) -> jax.Array:
        inverse_ONg = jnp.where(scale_ONg > 0, 1 / jnp.where(scale_ONg > 0, scale_ONg, 1), 0)
        return jnp.clip(jnp.round((x_ONgi + offset_ONg[..., None]) * inverse_ONg[..., None]), 0, 15)

    def error(values_ONgi: jax.Array, scale_ONg: jax.Array, offset_ONg: jax.Array) -> jax.Array:
        return ((values_ONgi * scale_ONg[..., None] - offset_ONg[..., None] - x_ONgi) ** 2).sum(-1)

    def least(attempt: Callable[[jax.Array], tuple[jax.Array, ...]], tried: Sequence[float]) -> list[jax.Array]:
        """Of several attempts, each (error, ...), the one with the least error, block by block."""

        def step(best: list[jax.Array], part: jax.Array) -> tuple[list[jax.Array], None]:
            new = attempt(part)
            better = new[0] < best[0]
            return [jnp.where(better, *pair) for pair in zip(new, best, strict=True)], None

        nothing = jnp.zeros_like(low_ONg)
        return lax.scan(step, [nothing + jnp.inf, nothing, nothing], jnp.array(tried, jnp.float32))[0][1:]

    def fitted(part: jax.Array) -> tuple[jax.Array, ...]:
        def refit(_: int, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            scale_ONg, values_ONgi = pair[0], values(*pair)
            apart_ONgi = values_ONgi - values_ONgi.mean(-1, keepdims=True)
            square_ONg, along_ONg = (apart_ONgi**2).sum(-1), (apart_ONgi * x_ONgi).sum(-1)
            fits = (square_ONg > 0) & (along_ONg > 0)
            scale_ONg = jnp.where(fits, along_ONg / jnp.where(fits, square_ONg, 1), scale_ONg)
            return scale_ONg, jnp.maximum(scale_ONg * values_ONgi.mean(-1) - mean_ONg, 0)

        range_ONg = high_ONg - low_ONg
        pair = lax.fori_loop(0, REFITS, refit, (range_ONg * ((1 - part) / 15), -low_ONg - range_ONg * (part / 2)))
        return error(values(*pair), *pair), *pair

    scale_ONg, offset_ONg = least(fitted, SHRUNK)

    # Then in six bits: the scale that is nearest and its neighbours, each with the offset that is best for it.
    scale_ON, offset_ON = ((all_ONg.max(-1) / 63).astype(jnp.float16) for all_ONg in (scale_ONg, offset_ONg))
    unit_ON1, unit_o_ON1 = (one_ON.astype(jnp.float32)[..., None] for one_ON in (scale_ON, offset_ON))
    safe_ON1, safe_o_ON1 = (jnp.where(unit > 0, unit, 1) for unit in (unit_ON1, unit_o_ON1))

    def in_six_bits(step: jax.Array) -> tuple[jax.Array, ...]:
        six_ONg = jnp.clip(jnp.round(scale_ONg / safe_ON1) + step, 0, 63)
        wide_ONg = six_ONg * unit_ON1
        best_ONg = (values(wide_ONg, offset_ONg) * wide_ONg[..., None] - x_ONgi).mean(-1)
        six_o_ONg = jnp.clip(jnp.round(best_ONg / safe_o_ON1), 0, 63)
        wide_o_ONg = six_o_ONg * unit_o_ON1
        return error(values(wide_ONg, wide_o_ONg), wide_ONg, wide_o_ONg), six_ONg, six_o_ONg

    six_ONg, six_o_ONg = least(in_six_bits, (0, -1, 1))
    values_ONgi = values(six_ONg * unit_ON1, six_o_ONg * unit_o_ON1)
    return (*(a.astype(jnp.uint8) for a in (values_ONgi, six_ONg, six_o_ONg)), scale_ON, offset_ON)


TOPS = (31.0, 31.3, 31.6, 31.9, 32.2, 32.5)
"""What a block's largest number may become in six bits."""


@functools.partial(jax.jit, static_argnums=1)
def _rounded_to_six(weight_OI: jax.Array, rotated: bool) -> tuple[jax.Array, jax.Array]:
    """Values uint8 [O, I to whole blocks], and scales float16 [O, G], of either sign: w = s (v - 32).

    Of a few scales the one with the least squared error, each fitted to the values that it leads to.
    """
    weight_OI = rotate(weight_OI) if rotated else weight_OI
    x_OGi = jnp.pad(weight_OI, ((0, 0), (0, -weight_OI.shape[1] % STEP))).reshape(weight_OI.shape[0], -1, STEP)
    largest_OG1 = jnp.take_along_axis(x_OGi, jnp.abs(x_OGi).argmax(-1, keepdims=True), -1)
    safe_OG1 = jnp.where(largest_OG1 != 0, largest_OG1, 1)

    def step(best: tuple[jax.Array, ...], top: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        values_OGi = jnp.clip(jnp.round(x_OGi * (-top / safe_OG1)), -32, 31)
        square_OG1 = (values_OGi**2).sum(-1, keepdims=True)
        fitted_OG1 = (x_OGi * values_OGi).sum(-1, keepdims=True) / jnp.where(square_OG1 > 0, square_OG1, 1)
        scale_OG1 = fitted_OG1.astype(jnp.float16).astype(jnp.float32)
        error_OG1 = ((scale_OG1 * values_OGi - x_OGi) ** 2).sum(-1, keepdims=True)
        better = error_OG1 < best[0]
        return tuple(
            jnp.where(better, *pair) for pair in zip((error_OG1, values_OGi, scale_OG1), best, strict=True)
        ), None

    nothing = jnp.zeros_like(largest_OG1)
    (_, values_OGi, scale_OG1), _ = lax.scan(
        step, (nothing + jnp.inf, x_OGi * 0, nothing), jnp.array(TOPS, jnp.float32)
    )
    return (values_OGi + 32).astype(jnp.uint8).reshape(len(x_OGi), -1), scale_OG1[..., 0].astype(jnp.float16)


def _as_q4_k(
    values_ONgi: jax.Array, six_ONg: jax.Array, six_o_ONg: jax.Array, scale_ON: jax.Array, offset_ON: jax.Array
) -> np.ndarray:
    """GGUF's blocks of 256 inputs, 144 bytes each: two halves, eight pairs of six bits, values of neighbouring groups in a byte."""
    values, six, six_o = (np.asarray(a) for a in (values_ONgi, six_ONg, six_o_ONg))
    halves = np.stack([np.asarray(scale_ON), np.asarray(offset_ON)], -1).view(np.uint8)
    first, last = slice(0, 4), slice(4, 8)
    packed = [
        six[..., first] | six[..., last] >> 4 << 6,
        six_o[..., first] | six_o[..., last] >> 4 << 6,
        six[..., last] & 15 | (six_o[..., last] & 15) << 4,
    ]
    nibbles = (values[..., 0::2, :] | values[..., 1::2, :] << 4).reshape(*six.shape[:2], -1)
    return np.concatenate([halves, *packed, nibbles], -1).reshape(len(six), -1)
