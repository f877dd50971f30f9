"""Block weights made on the host from the rows of checkpoints, on the caller's thread, without XLA.

A tensor comes as `CodedRows`, its rows as the file has them; `pack` lays rows of one or several such tensors out for the
kernels, in any order. See ops/native/blocks/blocks_pack.cc.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ops import native
from ops.linear.weights.blocks import NEST, PANEL, SCALES, STEP, BlockWeight, Form, Stretch
from ops.linear.weights.rotation import BLOCK, rotate

PLAIN = -1

GGUF = {
    2: ("Q4_0", Form(4, zero=8)),
    3: ("Q4_1", Form(4, offset="float16")),
    6: ("Q5_0", Form(6, zero=16)),
    7: ("Q5_1", Form(6, offset="float16")),
    8: ("Q8_0", Form(8, zero=128)),
    12: ("Q4_K", Form(4, scale="nested_u8", offset="nested_u8")),
    13: ("Q5_K", Form(6, scale="nested_u8", offset="nested_u8")),
    14: ("Q6_K", Form(6, zero=32, block=16, scale="nested_s8")),
    20: ("IQ4_NL", Form(4, zero=128, table="iq4_nl")),
    23: ("IQ4_XS", Form(4, zero=128, scale="nested_s8", table="iq4_nl")),
    39: ("MXFP4", Form(4, zero=16, scale="power", table="e2m1", power=-1)),
}
"""GGUF's block types that have an exact form, by their numbers."""


@dataclasses.dataclass(frozen=True)
class CodedRows:
    """A tensor's rows as they are stored.

    Attributes:
        form: what they become.
        inputs: values a row.
        rows_RB: uint8 [rows, bytes]: a GGUF tensor's blocks, or a byte a value.
        kind: GGUF's number of the block type, or PLAIN.
        scale_RG, offset_RG: of plain rows [rows, ceil(inputs / block)], in the form's types.
        order_I: the input that each value belongs to, where a checkpoint's inputs were sorted; None for the same one.
    """

    form: Form
    inputs: int
    rows_RB: np.ndarray
    kind: int = PLAIN
    scale_RG: np.ndarray | None = None
    offset_RG: np.ndarray | None = None
    order_I: np.ndarray | None = None


def can_pack(form_R: np.ndarray) -> bool:
    """Whether rows with these forms' numbers fall into panels of one form each."""
    whole = form_R[: len(form_R) // PANEL * PANEL].reshape(-1, PANEL)
    rest = form_R[len(whole) * PANEL :]
    return bool((whole == whole[:, :1]).all() and (rest == rest[:1]).all())


def same_order(tensors: Sequence[CodedRows]) -> bool:
    """Whether all have their inputs in one order, as rows of one weight must."""
    first = tensors[0].order_I
    return all(
        tensor.order_I is None
        if first is None
        else tensor.order_I is not None and np.array_equal(tensor.order_I, first)
        for tensor in tensors
    )


def pack(
    tensors: Sequence[CodedRows],
    tensor_R: np.ndarray,
    row_R: np.ndarray,
    empty: Callable[[tuple[int, ...], Any], np.ndarray] = np.empty,
    rotated: bool = False,
) -> BlockWeight:
    """The weight whose row r is row `row_R[r]` of `tensors[tensor_R[r]]`, of numpy arrays.

    Args:
        empty: (shape, dtype) -> where the result goes.
    Raises:
        ValueError: rows of different lengths, panels of different forms, or scales that are no finite numbers.
    """
    inputs = tensors[0].inputs
    if any(tensor.inputs != inputs for tensor in tensors):
        raise ValueError(f"rows of {sorted({tensor.inputs for tensor in tensors})} inputs cannot be one weight.")
    order_I = tensors[0].order_I
    if not same_order(tensors):
        raise ValueError("rows whose inputs are sorted differently cannot be one weight.")
    forms = list(dict.fromkeys(tensor.form for tensor in tensors))
    form_R = np.array([forms.index(tensor.form) for tensor in tensors])[tensor_R]
    if not can_pack(form_R):
        raise ValueError("16 neighbouring rows are stored in different forms, which no panel can be.")
    stretches, starts, size = _stretches(forms, form_R, inputs)
    bytes_N = empty((size,), np.uint8)
    for stretch, start, end in zip(stretches, starts, [*starts[1:], len(form_R)], strict=True):
        _fill(bytes_N[stretch.offset :], stretch.form, tensors, tensor_R[start:end], row_R[start:end])
    shape = (len(form_R), inputs)
    order_I = None if order_I is None else order_I.astype(np.int32)
    return BlockWeight(bytes_N, shape, tuple(stretches), rotated, order_I)  # pyright: ignore[reportArgumentType]


def _stretches(forms: Sequence[Form], form_R: np.ndarray, inputs: int) -> tuple[list[Stretch], list[int], int]:
    """Stretches of rows of one form each, each one's first row, and bytes in all."""
    is_start = np.concatenate([[True], form_R[1:] != form_R[:-1]])
    half, odd = divmod(len(form_R), 2)
    if not odd and half % PANEL == 0:
        is_start[half] = True  # gate and up, if that is what they are, then fall into the same groups
    starts = np.flatnonzero(is_start).tolist()  # plain numbers: kept files are JSON
    stretches, offset = [], 0
    for start, end in zip(starts, [*starts[1:], len(form_R)], strict=True):
        form, panels = forms[form_R[start]], -(-(end - start) // PANEL)
        stretches.append(Stretch(form, panels, offset))
        offset += panels * form.panel_bytes(inputs)
    return stretches, starts, offset


def _fill(out_N: np.ndarray, form: Form, tensors: Sequence[CodedRows], tensor_R: np.ndarray, row_R: np.ndarray) -> None:
    # Tensors of one form may be stored in different ways; each run of one way is a call, and runs are whole panels.
    kind_R = np.array([tensor.kind for tensor in tensors])[tensor_R]
    if (kind_R != kind_R[0]).any():
        raise ValueError("rows of one form come in different block types.")
    size = {"scale_RG": SCALES[form.scale], "offset_RG": SCALES[form.offset]}
    pointers: dict[str, Any] = {}
    for field in ("rows_RB", "scale_RG", "offset_RG"):
        arrays = [getattr(tensor, field) for tensor in tensors]
        used = [arrays[index] for index in np.unique(tensor_R)]
        if any(array is None for array in used):
            pointers[field] = None
            continue
        for array in used:
            if not array.flags.c_contiguous or (field in size and array.dtype.itemsize != size[field]):
                raise ValueError(f"{field} of {array.dtype}{list(array.shape)} is not what its form stores.")
        base = np.array([0 if array is None else array.ctypes.data for array in arrays], np.uint64)
        step = np.array([0 if array is None else array.strides[0] for array in arrays], np.uint64)
        pointers[field] = np.ascontiguousarray(base[tensor_R] + step[tensor_R] * row_R.astype(np.uint64))
    numbers = form.numbers()
    failed = native.library().jaxserve_blocks_pack(
        ctypes.c_int64(int(kind_R[0])),
        ctypes.c_void_p(numbers.ctypes.data),
        *(ctypes.c_void_p(None if array is None else array.ctypes.data) for array in pointers.values()),
        ctypes.c_int64(len(row_R)),
        ctypes.c_int64(tensors[0].inputs),
        ctypes.c_void_p(out_N.ctypes.data),
    )
    if failed:
        raise ValueError("a block's scale is not a finite number: the tensor is damaged.")


FOUR_BITS = 12
"""What `four_bits` makes, by GGUF's number: 4.5 bits a weight, with scales and offsets of six bits for every 32 inputs."""

SHRUNK = (0.0, 0.07, 0.14)
"""Parts of a block's range, half of them at either end, that `four_bits` tries to leave out."""

REFITS = 2
"""Times that scale and offset are fitted to the values they lead to."""


def four_bits(weight_OI: np.ndarray, empty: Callable[[tuple[int, ...], Any], np.ndarray] = np.empty) -> BlockWeight:
    """A dense weight rounded to four bits, of numpy arrays; rotated where its inputs are whole blocks of 64.

    Each block of 32 inputs gets the scale and the offset, of a few, that leave the least squared error: of Whisper's decoder 5.0e-3
    of the weights' squares, where llama.cpp's Q4_K leaves 5.9e-3 in as many bits, and a scale alone 6.8e-3.

    Args:
        weight_OI: of any float dtype.
        empty: (shape, dtype) -> where the result goes.
    """
    O, I = weight_OI.shape
    rotated = I % BLOCK == 0
    rows_RB = np.empty((O, -(-I // NEST) * 144), np.uint8)
    for first in range(0, O, ROWS):
        rows = slice(first, min(O, first + ROWS))
        part = jnp.asarray(np.asarray(weight_OI[rows], np.float32))
        rows_RB[rows] = _as_q4_k(*_rounded_to_four(part, rotated))
    coded = CodedRows(GGUF[FOUR_BITS][1], I, rows_RB, FOUR_BITS)
    return pack([coded], np.zeros(O, np.int64), np.arange(O), empty, rotated)


def four_bits_like(shape: tuple[int, int]) -> BlockWeight:
    """What `four_bits` makes of a weight [O, I], of an array without values."""
    stretches, _, size = _stretches([GGUF[FOUR_BITS][1]], np.zeros(shape[0], np.int64), shape[1])
    bytes_N: Any = jax.ShapeDtypeStruct((size,), np.uint8)
    return BlockWeight(bytes_N, shape, tuple(stretches), shape[1] % BLOCK == 0)


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
