"""Files of kept weights that a start is likely to want, read by a thread while it does what comes before them.

Where memory is full of files, a gigabyte of huge pages takes longer to be found (1.3 s) than to be filled (0.3 s). A start waits
for neither while it imports and reads headers, which is Python alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np


class _Reading:
    def __init__(self, path: Path, read: Callable[[Path], np.ndarray]) -> None:
        self._path, self._read = path, read
        self._data: np.ndarray | None = None
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._data = self._read(self._path)
        except Exception:  # whoever wants it reads it again, and says what is wrong
            self._data = None

    def result(self) -> np.ndarray | None:
        self._thread.join()
        return self._data


_readings: dict[Path, _Reading] = {}
_lock = threading.Lock()


def begin(path: Path, read: Callable[[Path], np.ndarray]) -> None:
    """Begins to read a file, unless that has begun."""
    with _lock:
        if path not in _readings:
            _readings[path] = _Reading(path, read)


def take(path: Path) -> np.ndarray | None:
    """What has been read of a file, for one caller; waits for it. None where nobody has begun, or where it failed."""
    with _lock:
        reading = _readings.pop(path, None)
    return None if reading is None else reading.result()


def forget() -> None:
    """Lets go of what nobody has taken."""
    with _lock:
        _readings.clear()
