"""Host arrays that devices can take over without a copy, and the copies that fill them.

On CPU, JAX uses a numpy array's memory as it is where that begins at a multiple of 64 bytes; otherwise it copies, into
memory without huge pages: 1.3 s a GB, where filling an array of numpy's own takes 0.1 to 0.2 (two cores). Copies run without
the interpreter's lock, which numpy holds on to while it copies or casts bfloat16, and so do all casts that `ops.casts` knows.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ops import casts

ALIGNMENT = 64
_BLOCK = 1 << 18  # elements cast at once: their temporaries stay in cache
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_HUGE = 2 << 20  # bytes of a huge page
_ROOM = 32 << 20  # bytes that small lasting arrays share
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialized array, C-contiguous, whose data begin at a multiple of ALIGNMENT bytes."""
    dtype = np.dtype(dtype)
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(num_bytes + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return raw[first : first + num_bytes].view(dtype).reshape(shape)


def huge_pages() -> bool:
    """Whether this system has huge pages for who asks for them."""
    try:
        return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in _HUGE_PAGES.read_text(encoding="utf-8")
    except OSError:
        return False


class Lasting:
    """Memory for arrays that stay as long as a model does, in huge pages where the system has them: weights are read from front to
    back in every step, and memory gives them twice as fast then (28 and 54 GB/s, two cores). Small ones lie side by side, as a huge
    page holds many. Memory is given back when all arrays of a room are gone, so what is short-lived does not belong here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._room = np.empty(0, np.uint8)
        self._taken = 0

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of anything, as the function `empty` makes it."""
        dtype = np.dtype(dtype)
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        with self._lock:
            if num_bytes > _ROOM // 4:
                room, first = self._make(num_bytes), 0
            else:
                if self._taken + num_bytes > self._room.size:
                    self._room, self._taken = self._make(_ROOM), 0
                room, first = self._room, self._taken
                self._taken += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return room[first : first + num_bytes].view(dtype).reshape(shape)

    @staticmethod
    def _make(num_bytes: int) -> np.ndarray:
        if not huge_pages():
            return empty((num_bytes,), np.uint8)
        mapped = mmap.mmap(-1, num_bytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE)
        room = np.frombuffer(mapped, np.uint8)
        first = -room.ctypes.data % _HUGE
        return room[first : first + num_bytes]


lasting = Lasting()


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
