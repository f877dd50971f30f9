"""The process's memory: what it may take, what a start leaves behind, and Python's cyclic garbage collector."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pathlib
import sys
import threading
from collections.abc import Iterator

YOUNG_OBJECTS = 100_000
"""While a server starts, new objects are looked through after this many and no others are. A start makes a quarter of a
million objects that stay (modules, types, traced programs): with no collection at all it took 0.8 s of CPU less, of 7.5."""


PROC, CGROUPS = pathlib.Path("/proc"), pathlib.Path("/sys/fs/cgroup")


def free_memory(proc: pathlib.Path = PROC, cgroups: pathlib.Path = CGROUPS) -> tuple[int, int]:
    """(free, all) bytes of this machine's memory, or of the container's where that may take less. What files only cache counts as
    free: the system takes it back when somebody asks.

    Args:
        proc, cgroups: where Linux tells of processes, and of what groups of them may take; need not be there.
    """
    free, whole = _of_machine(proc)
    for bound, used in _bounds(proc, cgroups):
        free, whole = min(free, max(bound - used, 0)), min(whole, bound)
    return free, whole


def _of_machine(proc: pathlib.Path) -> tuple[int, int]:
    with contextlib.suppress(OSError, KeyError, ValueError, IndexError):
        lines = (proc / "meminfo").read_text(encoding="utf-8").splitlines()
        values = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
        return values["MemAvailable"], values["MemTotal"]
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:  # macOS does not say
        return whole, whole
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), whole


def _bounds(proc: pathlib.Path, cgroups: pathlib.Path) -> Iterator[tuple[int, int]]:
    """(bytes at most, bytes in use) of each group that this process is in, from its own up to the outermost that can be seen."""
    try:
        groups = [line.split(":", 2) for line in (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return
    for number, kinds, path in (group for group in groups if len(group) == 3):
        if number == "0" and not kinds:
            root, most, now, cached = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in kinds.split(","):
            root, most, now, cached = (
                cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
            )  # fmt: skip
        else:
            continue
        own = root / path.lstrip("/")
        inside = [] if ".." in own.parts else [one for one in (own, *own.parents) if root in one.parents]
        for folder in (*inside, root):  # a container may see its own group alone, as the root
            with contextlib.suppress(OSError, ValueError, IndexError):  # "max": no bound here
                bound, used = (
                    int((folder / most).read_text(encoding="utf-8")),
                    int((folder / now).read_text(encoding="utf-8")),
                )
                stat = dict(
                    line.split()[:2] for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
                )
                yield bound, used - int(stat.get(cached, 0))


def begin_start() -> None:
    """Tells the garbage collector that a server starts: `end_start` takes it back. For a process that is ours alone."""
    gc.set_threshold(YOUNG_OBJECTS, 1000, 1000)


def end_start() -> None:
    """What is there now stays, so the garbage collector need never look at it again: a full collection held every stream up for
    140 ms, and now takes less than one."""
    gc.freeze()
    gc.set_threshold(*_THRESHOLD)


def let_go() -> None:
    """Looks through all that is there for what nobody holds any more, what `end_start` has set aside included: behind an engine
    that ends while the process goes on."""
    set_aside = gc.get_freeze_count() > 0  # not in a process that is somebody else's
    gc.unfreeze()
    gc.collect()
    if set_aside:
        gc.freeze()
    give_back()


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


def keep_freed() -> None:
    """Has the allocator keep what is freed, for a process that takes the same large buffers over and over: a training step of the
    default model took 1.2 GB from the operating system each time, a tenth of its time.
    To be called before there are threads. Does nothing where there is no glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_ARENA_MAX, 1)  # others than the first give back whatever they free


_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of malloc.h

PEAK_BYTES = 32 * 2**20
SETTLE_S = 2.0


class _Peaks:
    """Counts what was taken for a short time, and gives memory back when that came to something."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._noted = 0
        self._timer: threading.Timer | None = None

    def note(self, num_bytes: int) -> None:
        with self._lock:
            self._noted += num_bytes
            if self._noted < PEAK_BYTES or self._timer is not None:
                return
            self._timer = threading.Timer(SETTLE_S, self._settle)
            self._timer.daemon = True
            self._timer.start()

    def _settle(self) -> None:
        with self._lock:
            self._noted, self._timer = 0, None
        give_back()


_peaks = _Peaks()


def note_peak(num_bytes: int) -> None:
    """Tells that about so many bytes were taken for a short time (a large body, many completions): after tens of megabytes what is
    free again goes back to the operating system, `SETTLE_S` seconds later and on a thread of its own. Any thread may call."""
    _peaks.note(num_bytes)


_THRESHOLD = gc.get_threshold()
