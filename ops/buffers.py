"""Host arrays that devices can take over without a copy, and the copies that fill them.

On CPU, JAX uses a numpy array's memory as it is where that begins at a multiple of 64 bytes; otherwise it copies, into
memory without huge pages: 1.3 s a GB, where filling an array of numpy's own takes 0.1 to 0.2 (two cores). Copies run without
the interpreter's lock, which numpy holds on to while it copies or casts bfloat16, and so do all casts that `ops.casts` knows.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from ops import casts

ALIGNMENT = 64
_BLOCK = 1 << 18  # elements cast at once: their temporaries stay in cache
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialized array, C-contiguous, whose data begin at a multiple of ALIGNMENT bytes."""
    dtype = np.dtype(dtype)
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(num_bytes + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return raw[first : first + num_bytes].view(dtype).reshape(shape)


def copy(out: np.ndarray, source: np.ndarray) -> None:
    """out[...] = source, of the same shape; cast where dtypes differ."""
    if out.dtype == source.dtype and out.dtype.itemsize in _BITS:
        bits = _BITS[out.dtype.itemsize]
        out.view(bits)[...] = source.view(bits)
    elif casts.cast(out, source):
        pass
    elif source.dtype == _BFLOAT16 and out.dtype == np.float32:
        _widen(out, source)
    else:
        np.copyto(out, source, casting="unsafe")


def _widen(out: np.ndarray, source: np.ndarray) -> None:
    """bfloat16 to float32: a bfloat16 is the upper half of the float32 of the same value."""
    if not (out.flags.c_contiguous and source.flags.c_contiguous):
        out.view(np.uint32)[...] = source.view(np.uint16)
        out.view(np.uint32)[...] <<= 16
        return
    flat_out, flat_source = out.reshape(-1).view(np.uint32), source.reshape(-1).view(np.uint16)
    for first in range(0, flat_out.size, _BLOCK):
        block = flat_out[first : first + _BLOCK]
        block[...] = flat_source[first : first + _BLOCK]
        block <<= 16


def owned(array: np.ndarray, dtype: Any) -> np.ndarray:
    """The array in `dtype`, contiguous and aligned, in memory that nobody else writes: itself where it is all that.

    Args:
        array: of memory of its own, or a read-only view of a file.
    """
    ready = array.flags.writeable and array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0
    if ready and array.dtype == dtype:
        return array
    out = empty(array.shape, dtype)
    copy(out, array)
    return out
