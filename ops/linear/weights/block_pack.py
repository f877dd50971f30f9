"""Block weights made on the host from the rows of checkpoints, on the caller's thread, without XLA.

A tensor comes as `CodedRows`, its rows as the file has them; `pack` lays rows of one or several such tensors out for the
kernels, in any order. See ops/native/blocks/blocks_pack.cc.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ops import native
from ops.linear.weights.blocks import PANEL, SCALES, BlockWeight, Form, Stretch

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
SIZES = {
    PLAIN: (1, 1), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    20: (32, 18), 23: (256, 136), 39: (32, 17),
}  # fmt: skip
"""Values and bytes of a block of each."""


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

    def check(self, row_R: np.ndarray) -> None:
        """Raises ValueError where arrays have not what the given rows would be read from."""
        rows, (block, size) = len(self.rows_RB), SIZES[self.kind]
        parts = [(self.rows_RB, rows, -(-self.inputs // block) * size)]
        groups = -(-self.inputs // self.form.block)
        parts += [(part, rows, groups) for part in (self.scale_RG, self.offset_RG) if part is not None]
        if any(part.shape != (count, length) for part, count, length in parts):
            raise ValueError(
                f"{[list(part.shape) for part, *_ in parts]} are not {rows} rows of {self.inputs} inputs as stored."
            )
        if len(row_R) and not 0 <= row_R.min() <= row_R.max() < rows:
            raise ValueError(f"rows {row_R.min()} to {row_R.max()} are asked for, and there are {rows}.")


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


def joined(tensors: Sequence[CodedRows]) -> CodedRows | None:
    """Tensors' rows one behind the other; None where they are stored in different ways."""
    first = tensors[0]
    kinds = {(tensor.form, tensor.inputs, tensor.kind, tensor.order_I is None) for tensor in tensors}
    if len(kinds) > 1 or first.order_I is not None:
        return None
    parts = ((tensor.rows_RB, tensor.scale_RG, tensor.offset_RG) for tensor in tensors)
    arrays = [None if array[0] is None else np.concatenate(array) for array in zip(*parts, strict=True)]
    rows_RB, scale_RG, offset_RG = arrays
    assert rows_RB is not None
    return dataclasses.replace(first, rows_RB=rows_RB, scale_RG=scale_RG, offset_RG=offset_RG)


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
    if not len(row_R):
        raise ValueError("a weight has no rows.")
    for index, tensor in enumerate(tensors):
        tensor.check(row_R[tensor_R == index])
    if any(tensor.inputs != inputs for tensor in tensors):
        raise ValueError(f"rows of {sorted({tensor.inputs for tensor in tensors})} inputs cannot be one weight.")
    order_I = tensors[0].order_I
    if not same_order(tensors):
        raise ValueError("rows whose inputs are sorted differently cannot be one weight.")
    forms = list(dict.fromkeys(tensor.form for tensor in tensors))
    form_R = np.array([forms.index(tensor.form) for tensor in tensors])[tensor_R]
    if not can_pack(form_R):
        raise ValueError("16 neighbouring rows are stored in different forms, which no panel can be.")
    stretches, starts, size = stretches_of(forms, form_R, inputs)
    bytes_N = empty((size,), np.uint8)
    for stretch, start, end in zip(stretches, starts, [*starts[1:], len(form_R)], strict=True):
        _fill(bytes_N[stretch.offset :], stretch.form, tensors, tensor_R[start:end], row_R[start:end])
    shape = (len(form_R), inputs)
    order_I = None if order_I is None else order_I.astype(np.int32)
    return BlockWeight(bytes_N, shape, tuple(stretches), rotated, order_I)  # pyright: ignore[reportArgumentType]


def stretches_of(forms: Sequence[Form], form_R: np.ndarray, inputs: int) -> tuple[list[Stretch], list[int], int]:
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
