"""From packed numbers to float32: bits out of words, tables of small floats, and scales by rows, groups and blocks."""

from __future__ import annotations

import numpy as np

from ops import buffers, casts

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""E2M1 by its four bits."""
_FP6_MAGNITUDES = [m / 8 for m in range(8)] + [(1 + m / 8) * 2**e for e in range(3) for m in range(8)]
FP6 = np.array([*_FP6_MAGNITUDES, *(-value for value in _FP6_MAGNITUDES)], np.float32)
"""E2M3 by its six bits."""


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """[..., n] int32, uint32 or uint8 -> [..., n * itemsize * 8 / bits] unsigned values as uint8, lowest bits first.

    Where bits do not divide a byte, values run on from one byte and word into the next.
    """
    words = np.ascontiguousarray(words).view(np.uint8)
    if 8 % bits == 0:
        out = np.empty((*words.shape, 8 // bits), np.uint8)
        for i in range(8 // bits):
            np.right_shift(words, bits * i, out=out[..., i])
        out &= np.uint8((1 << bits) - 1)
        return out.reshape(*words.shape[:-1], -1)
    stream = np.unpackbits(words, axis=-1, bitorder="little")
    count = stream.shape[-1] // bits
    values = stream[..., : count * bits].reshape(*words.shape[:-1], count, bits)
    return (values << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)


def signed(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned values of so many bits read as two's complement: int8."""
    half = 1 << (bits - 1)
    return ((values.astype(np.int16) ^ half) - half).astype(np.int8)


def scale_values(scale: np.ndarray) -> np.ndarray:
    """A scale as float32; bytes are powers of two (E8M0)."""
    if scale.dtype == np.uint8:
        return np.ldexp(np.float32(1), scale.astype(np.int32) - 127)
    return scale.astype(np.float32)


def dequantize(
    values_OI: np.ndarray, scale_OG: np.ndarray, zero_OG: np.ndarray | None, group: np.ndarray | int
) -> np.ndarray:
    """(values - zero) * scale as float32 [O, I].

    Args:
        values_OI: of any dtype.
        group: how many neighbouring inputs share a scale, or for each input its group.
    """
    scale_OG = np.ascontiguousarray(scale_OG, np.float32)
    zero_OG = None if zero_OG is None else np.ascontiguousarray(zero_OG, np.float32)
    if not isinstance(group, np.ndarray):
        down = -(-values_OI.shape[0] // scale_OG.shape[0])
        return scaled(np.ascontiguousarray(values_OI), scale_OG, zero_OG, down, group)
    out = values_OI.astype(np.float32)
    if zero_OG is not None:
        out -= zero_OG[:, group]
    out *= scale_OG[:, group]
    return out


def scaled(values: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, down: int, across: int) -> np.ndarray:
    """(values - zero) * scale as float32, where blocks of `down` x `across` share them."""
    out = buffers.empty(values.shape, np.float32)
    if casts.cast_scaled(out, values, scale, down, across, zero):
        return out
    buffers.copy(out, values)
    if zero is not None:
        out -= spread(zero, out.shape, down, across)
    out *= spread(scale, out.shape, down, across)
    return out


def as_matrix(scale: np.ndarray) -> np.ndarray:
    """A scale (or zero) of a tensor, of rows, or of blocks as float32 [blocks down, blocks across]."""
    return np.ascontiguousarray(scale_values(scale).reshape(scale.shape[0] if scale.ndim else 1, -1))


def block_of(shape: tuple[int, ...], scales: tuple[int, ...], said: tuple[int, int] | None = None) -> tuple[int, int]:
    """(rows, columns) of a matrix that share one of its `scales`.

    Args:
        said: what the configuration says, for matrices that are not whole blocks; where scales are fewer or more than that
            makes them (one a tensor or a row), their number says it.
    """
    if said is not None and tuple(-(-n // size) for n, size in zip(shape, said, strict=True)) == scales:
        return said
    down, across = (-(-n // count) for n, count in zip(shape, scales, strict=True))
    return down, across


def spread(scale: np.ndarray, shape: tuple[int, ...], down: int, across: int) -> np.ndarray:
    """A scale of blocks as something that multiplies an array of `shape`."""
    rows, columns = shape
    if scale.shape[0] not in (1, rows):
        scale = np.repeat(scale, down, axis=0)[:rows]
    if scale.shape[1] not in (1, columns):
        scale = np.repeat(scale, across, axis=1)[:, :columns]
    return scale
