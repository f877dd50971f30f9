"""A file mapped into memory, read-only."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np


class MappedFile:
    """The bytes of a file, which must not be empty.

    Attributes:
        bytes: all of them; read-only. Views of it keep the mapping alive.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.bytes = np.frombuffer(self._map, np.uint8)

    def release(self, start: int, num_bytes: int) -> None:
        """Takes a part that was read out of this process's memory (not of the page cache): reading it again maps it again."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (start + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, end - first)
