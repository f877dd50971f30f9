"""Casts of host arrays, native where that can be: each thread reads and writes at memory's speed, without the interpreter's lock.

numpy takes 1.5 ns for a float16 and 10 ns for a float8 (two thirds of a billion and a tenth of a billion a second), and holds
the lock while it casts types of `ml_dtypes`. See ops/native/casts.cc.
"""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np

from ops import native

KINDS = {
    np.dtype(np.float32): 0,
    np.dtype(ml_dtypes.bfloat16): 1,
    np.dtype(np.float16): 2,
    np.dtype(ml_dtypes.float8_e4m3fn): 3,
    np.dtype(ml_dtypes.float8_e5m2): 4,
    np.dtype(np.int8): 5,
    np.dtype(np.uint8): 6,
}
"""What can be cast, by the numbers of ops/native/host_casts.h."""

TARGETS = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
"""What it can be cast to."""


def cast(out: np.ndarray, source: np.ndarray) -> bool:
    """out[...] = source, rounded to the nearest, where the native library can.

    Args:
        out, source: arrays of the same shape.
    Returns:
        whether it was done: not without the library, of other dtypes, or of arrays that are not C-contiguous.
    """
    can = out.dtype in TARGETS and source.dtype in KINDS and out.shape == source.shape
    if not can or not (out.flags.c_contiguous and source.flags.c_contiguous) or not native.available():
        return False
    kinds = [ctypes.c_int64(KINDS[array.dtype]) for array in (source, out)]
    native.library().jaxserve_cast(_pointer(source), kinds[0], _pointer(out), kinds[1], ctypes.c_int64(source.size))
    return True


def cast_scaled(
    out_RC: np.ndarray,
    source_RC: np.ndarray,
    scale: np.ndarray,
    block_rows: int,
    block_columns: int,
    zero: np.ndarray | None = None,
) -> bool:
    """out = (source - zero) * scale, of the block that a number is in, where the native library can.

    Args:
        out_RC: float32.
        scale, zero: float32 [ceil(R / block_rows), ceil(C / block_columns)].
    Returns:
        whether it was done, as `cast`.
    Raises:
        ValueError: a scale or zero of another shape.
    """
    R, C = source_RC.shape
    wanted = (-(-R // block_rows), -(-C // block_columns))
    if scale.shape != wanted or out_RC.shape != (R, C) or (zero is not None and zero.shape != wanted):
        raise ValueError(f"scales {list(scale.shape)} of a matrix {[R, C]} should be {list(wanted)}.")
    floats = [out_RC, scale] + ([] if zero is None else [zero])
    can = source_RC.dtype in KINDS and all(array.dtype == np.float32 for array in floats)
    if not can or not all(array.flags.c_contiguous for array in (source_RC, *floats)) or not native.available():
        return False
    sizes = [ctypes.c_int64(n) for n in (KINDS[source_RC.dtype], R, C, block_rows, block_columns)]
    no_zero = ctypes.c_void_p(None)
    native.library().jaxserve_cast_scaled(
        _pointer(source_RC),
        sizes[0],
        _pointer(out_RC),
        *sizes[1:3],
        _pointer(scale),
        no_zero if zero is None else _pointer(zero),
        *sizes[3:],
    )
    return True


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
