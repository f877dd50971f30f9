"""The process's memory: what a start leaves behind, and Python's cyclic garbage collector."""

from __future__ import annotations

import ctypes
import gc
import sys

YOUNG_OBJECTS = 100_000
"""While a server starts, new objects are looked through after this many and no others are. A start makes a quarter of a
million objects that stay (modules, types, traced programs): with no collection at all it took 0.8 s of CPU less, of 7.5."""


def begin_start() -> None:
    """Tells the garbage collector that a server starts: `end_start` takes it back. For a process that is ours alone."""
    gc.set_threshold(YOUNG_OBJECTS, 1000, 1000)


def end_start() -> None:
    """What is there now stays, so the garbage collector need never look at it again: a full collection held every stream up for
    140 ms, and now takes less than one."""
    gc.freeze()
    gc.set_threshold(*_THRESHOLD)


def give_back() -> int | None:
    """Gives freed memory that the allocator holds back to the operating system: buffers of loading and compiling, 60 to
    140 MB after a start of the default model, in 5 to 25 ms. glibc keeps it otherwise, because something small lives above it.

    Returns:
        1 where something was given back, 0 where there was nothing, None where the C library does not do this.
    """
    if not sys.platform.startswith("linux"):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    return None if trim is None else trim(0)


_THRESHOLD = gc.get_threshold()
