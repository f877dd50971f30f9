"""The folder of kept weights: what they are kept under, how much of the disk they may take, and what goes first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.loading.kept import ahead
from models.loading.kept.file import DamagedError, Parameter, memory_of, read, write
from ops import native, sources
from ops.linear import StoredWeight

log = logging.getLogger(__name__)

GIB = 1 << 30
SUFFIX = ".weights"
NOTE = ".last"
LEAST = 32 << 20  # bytes of weights below which keeping them saves nothing
SPARED, MOST_SPARED = 0.1, 4 * GIB  # of the disk, which is left free, but no more than this
ABANDONED_S = 3600.0  # a file that nobody has finished by then never will be
_LASTS_S = {".part": ABANDONED_S, NOTE: 30 * 86400.0}
CODE = ("models", "ops", "sharding")


class WeightCache:
    """Weights of models in their final form, as files of one folder, the least recently used of which go when there is no room.

    Args:
        folder: only this user may write to it.
        limit: bytes of all files together, at most.
        say: told what was kept or thrown away, and why, as lines.
        least: bytes of weights below which a model is not kept.
    """

    def __init__(
        self, folder: Path, limit: int = 32 * GIB, say: Callable[[str], None] = log.info, least: int = LEAST
    ) -> None:
        self.folder = folder
        self.limit = limit
        self._say = say
        self._least = least
        self._writing: list[threading.Thread] = []
        self._notes: dict[str, Path] = {}  # of keys that were asked for

    def expect(self, files: Iterable[Path]) -> None:
        """Begins to read what was kept of a checkpoint last, by this code: most likely `read` is asked for it soon. Otherwise
        `finish` lets go of it."""
        with contextlib.suppress(OSError, ValueError):
            path = self._path(self._note(files).read_text(encoding="utf-8")[:40])
            if path.parent == self.folder and path.stat().st_uid == os.getuid():
                ahead.begin(path, memory_of)

    def _note(self, files: Iterable[Path]) -> Path:
        """Where it is noted under which key a checkpoint's weights were kept last."""
        name = hashlib.sha256(json.dumps([list(map(str, files)), sources.digest(*CODE)]).encode()).hexdigest()[:40]
        return self.folder / f"{name}{NOTE}"

    def _note_key(self, key: str) -> None:
        note = self._notes.get(key)
        if note is not None:
            with contextlib.suppress(OSError):
                note.write_text(key, encoding="utf-8")

    def key(self, files: Iterable[Path], settings: Mapping[str, Any]) -> str:
        """What a model's weights are kept under.

        Args:
            files: of the checkpoint, which count by path, size and time of change.
            settings: everything else that decides the weights, besides this code and this CPU; as JSON takes it.
        """
        files = list(files)
        stamps = [(str(path), found.st_size, found.st_mtime_ns) for path in files for found in (path.stat(),)]
        kernels = native.isa() if native.available() else "none"
        everything = [stamps, sources.digest(*CODE), kernels, dict(settings)]
        key = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:40]
        self._notes[key] = self._note(files)
        return key

    def read(self, key: str) -> dict[str, Parameter] | None:
        """The weights kept under a key; None where there are none that can be used. A damaged file is thrown away."""
        path = self._path(key)
        try:
            if path.stat().st_uid != os.getuid():
                return None
            found = read(path, key)
            os.utime(path)
            self._note_key(key)
            return found
        except FileNotFoundError:
            return None
        except OSError as error:
            self._say(f"kept weights {path} cannot be read ({error.strerror or error})")
            return None
        except (DamagedError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self._say(f"kept weights {path} are damaged ({error}): they are made anew")
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def keep(self, key: str, parameters: Mapping[str, Any]) -> None:
        """Keeps weights from now on, written by a thread of its own; see `finish`.

        Args:
            parameters: of arrays that numpy can see and nobody changes.
        """
        size = sum(_num_bytes(value) for value in parameters.values())
        if size < self._least or not self._make_room(size):
            return
        thread = threading.Thread(target=self._write, args=(key, dict(parameters), size), name="weights", daemon=True)
        self._writing.append(thread)
        thread.start()

    def finish(self) -> None:
        """Waits until all is written, and lets go of what was expected in vain."""
        ahead.forget()
        while self._writing:
            self._writing.pop().join()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _write(self, key: str, parameters: dict[str, Any], size: int) -> None:
        try:
            write(self._path(key), key, parameters)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            self._say(f"weights are not kept in {self.folder} ({reason}): the next start converts them again")
            return
        self._note_key(key)
        self._say(f"weights kept in {self.folder} for the next start ({size / GIB:.2f} GiB)")

    def _make_room(self, size: int) -> bool:
        """Whether there is room for `size` bytes more, after what has not been used for longest has gone; nothing goes in vain."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            files = sorted(self._files())
            disk = shutil.disk_usage(self.folder)
            spared = min(SPARED * disk.total, MOST_SPARED)
            taken, free = sum(found for _, found, _ in files), disk.free - spared
            if size > min(self.limit, free + taken):
                self._say(
                    f"weights of {size / GIB:.2f} GiB are not kept in {self.folder}: all together may take "
                    f"{self.limit / GIB:.2f} GiB (--weight-cache-gb), and of {disk.free / GIB:.1f} GiB that the disk has free "
                    f"{spared / GIB:.1f} stay so"
                )
                return False
            while taken + size > self.limit or size > free:
                _, gone, path = files.pop(0)
                path.unlink(missing_ok=True)  # who has it mapped keeps it
                taken, free = taken - gone, free + gone
        except OSError as error:
            self._say(f"weights are not kept in {self.folder} ({error.strerror or error})")
            return False
        return True

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(last used, bytes, path) of what is kept; what nobody finished goes."""
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                if path.suffix == SUFFIX:
                    yield found.st_mtime, found.st_size, path
                elif time.time() - found.st_mtime > _LASTS_S.get(path.suffix, math.inf):
                    path.unlink()


def _num_bytes(value: Any) -> int:
    arrays = [value] if not isinstance(value, StoredWeight) else vars(value).values()
    return sum(int(np.prod(array.shape)) * array.dtype.itemsize for array in arrays if hasattr(array, "nbytes"))
