"""Rows of arrays that are cut over devices, put together on the host and cut again: what a page or a state is outside of a mesh.

A row's part is what one device holds of it: (start, stop) along each axis behind the first. Where nothing is cut there is one part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

Part = tuple[tuple[int | None, int | None], ...]


def part_of(index: tuple[slice, ...]) -> Part:
    """Of a device's part of an array, which part of a row it is."""
    return tuple((s.start, s.stop) for s in index[1:])


def slices(part: Part) -> tuple[slice, ...]:
    """The part of a whole row."""
    return tuple(slice(start, stop) for start, stop in part)


def whole(parts: Mapping[Part, np.ndarray], shape: Sequence[int]) -> np.ndarray:
    """A row of this shape, from its parts."""
    if len(parts) == 1:
        (only,) = parts.values()
        if only.shape == tuple(shape):
            return only
    row = np.empty(tuple(shape), next(iter(parts.values())).dtype)
    for part, content in parts.items():
        row[slices(part)] = content
    return row


def parts_here(array: jax.Array) -> list[Part]:
    """The different parts of a row that this process's devices hold."""
    return list(dict.fromkeys(part_of(shard.index) for shard in array.addressable_shards))


def row_bytes(arrays: Sequence[Any]) -> list[int]:
    """Bytes of a row of each array."""
    return [int(np.prod(a.shape[1:], dtype=np.int64)) * np.dtype(a.dtype).itemsize for a in arrays]


def packed(rows: Sequence[np.ndarray]) -> bytes:
    """A row of each array, one behind the other."""
    return b"".join(np.ascontiguousarray(row).view(np.uint8).reshape(-1).tobytes() for row in rows)


def unpacked(content: bytes | memoryview, arrays: Sequence[Any]) -> list[np.ndarray]:
    """The rows that were packed, one of each of `arrays`, whose shapes they have; views of `content`.

    Raises:
        ValueError: another number of bytes.
    """
    sizes = row_bytes(arrays)
    if sum(sizes) != len(content):
        raise ValueError(f"{len(content)} bytes, where a row has {sum(sizes)}")
    rows, at = [], 0
    for array, size in zip(arrays, sizes, strict=True):
        flat = np.frombuffer(content, np.uint8, size, at)
        rows.append(flat.view(np.dtype(array.dtype)).reshape(array.shape[1:]))
        at += size
    return rows
