"""Packed int8 weights made on the host: one pass over the dense weight on the caller's thread, without XLA.

For loaders: quantizing 0.5 billion weights takes 0.2 s on two cores, where `quantize` and `pack` take 2.5 s, most of it for
memory that XLA asks the system for. See ops/native/int8_pack.cc.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from ops import native
from ops.casts import KINDS
from ops.linear.weights.int8 import GROUP, PANEL, PackedInt8Weight
from ops.linear.weights.rotation import BLOCK

SOURCES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
"""dtypes of dense weights that are read as they are."""


def available() -> bool:
    """Whether this machine's CPU has a packed layout."""
    return native.available()


def pack(weight_OI: np.ndarray, empty: Callable[[tuple[int, ...], Any], np.ndarray] = np.empty) -> PackedInt8Weight:
    """What `ops.linear.pack(ops.linear.quantize(weight, "int8"))` gives (but for the last bit of a scale), of numpy arrays.

    Args:
        weight_OI: C-contiguous, of a dtype in SOURCES.
        empty: (shape, dtype) -> where the result goes.
    Raises:
        ValueError: another dtype or layout.
    """
    if weight_OI.ndim != 2 or weight_OI.dtype not in SOURCES or not weight_OI.flags.c_contiguous:
        raise ValueError(
            f"cannot pack a weight of {weight_OI.dtype}{list(weight_OI.shape)}: it must be dense, of two axes."
        )
    O, I = weight_OI.shape
    panels = -(-O // PANEL)
    panels_PQci = empty((panels, -(-I // 4), PANEL, 4), np.int8)
    scale_O = empty((panels * PANEL,), np.float32)
    sums_PGc = empty((panels, -(-I // GROUP), PANEL), np.int16)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (weight_OI, panels_PQci, scale_O, sums_PGc)]
    rotated = I % BLOCK == 0  # as `quantize` does it for a weight that is whole on one device
    sizes = [ctypes.c_int64(n) for n in (KINDS[weight_OI.dtype], O, I, rotated)]
    native.library().jaxserve_int8_pack(pointers[0], *sizes, *pointers[1:])
    return PackedInt8Weight(panels_PQci, scale_O, sums_PGc, (O, I), rotated)  # pyright: ignore[reportArgumentType]
