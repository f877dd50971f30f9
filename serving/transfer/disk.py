"""Pages that left the host tier, in files that outlive the process: bounded, and believed only after their digest was checked.

A file holds one page and is named by what decides its content: identity of the engine, and the digest under which the prefix index
has the page. Pages come back as from a peer: their request waits as RECEIVING while a thread reads and verifies them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pathlib
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from serving.engine.api.peers.transfers import Parcel, TransferError
from serving.engine.device.stores.parts import Part, packed, whole

log = logging.getLogger(__name__)

MAGIC = b"jaxserve page 1\n"
DIGEST_BYTES = 32
QUEUED = 256
"""Pages that wait to be written at most: of a burst of evictions the rest is lost, which costs time alone."""

HostPage = list[dict[Part, np.ndarray]]


class DiskTier:
    """The files of one engine. `keep` and `__contains__` are the engine thread's; a thread of its own writes.

    Args:
        folder: made where it is not there; a folder of this identity's lies below it.
        capacity: bytes at most.
        shapes: of a page's row of each array.
    Raises:
        ValueError: the folder cannot be used.

    Attributes:
        num_written, num_read, num_wrong: pages; the last are those whose digest did not fit, which are deleted.
    """

    def __init__(self, folder: pathlib.Path, identity: bytes, capacity: int, shapes: Sequence[tuple[int, ...]]) -> None:
        self.identity = identity
        self.capacity = capacity
        self.num_written = self.num_read = self.num_wrong = 0
        self._folder = folder / identity.hex()
        self._shapes = list(shapes)
        self._lock = threading.Lock()
        self._sizes: OrderedDict[bytes, int] = OrderedDict()  # the least recently used first
        self._total = 0
        self._queue: queue.Queue[tuple[bytes, HostPage] | None] = queue.Queue(QUEUED)
        self._enabled = True
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._find()
        except OSError as error:
            raise ValueError(f"kv_disk: {folder} cannot be used ({error.strerror or error}).") from None
        self._thread = threading.Thread(target=self._write_all, name="jaxserve-kv-disk", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, key: bytes) -> bool:
        return self._enabled and key in self._sizes

    @property
    def bytes(self) -> int:
        """What the files take."""
        return self._total

    def keep(self, key: bytes, page: HostPage) -> None:
        """Has a page written that host memory is about to forget."""
        if self._enabled and key not in self._sizes:
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait((key, page))

    def read(self, key: bytes) -> bytes:
        """A page's content, verified. On any thread.

        Raises:
            TransferError: incomplete (it is not there any more), wrong_digest (and then it is deleted).
        """
        path = self._path(key)
        try:
            raw = path.read_bytes()
        except OSError as error:
            self._forget(key)
            raise TransferError("incomplete", f"a page's file is gone ({error.strerror or error})") from error
        content = raw[len(MAGIC) + DIGEST_BYTES :]
        if raw[: len(MAGIC)] != MAGIC or raw[len(MAGIC) : len(MAGIC) + DIGEST_BYTES] != self._digest(key, content):
            self.num_wrong += 1
            self._delete(key)
            log.warning("a page in %s is damaged; it is deleted and computed anew", self._folder)
            raise TransferError("wrong_digest", "a page's file is not what it should be")
        self.num_read += 1
        with self._lock:
            if key in self._sizes:
                self._sizes.move_to_end(key)
        with contextlib.suppress(OSError):
            os.utime(path)
        return content

    def stop(self) -> None:
        """Neither writes nor finds anything from now on: the weights are others."""
        self._enabled = False

    def close(self, timeout: float = 10.0) -> None:
        """Writes what waits."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout)
        self._thread.join(timeout)

    # ---- files ----

    def _path(self, key: bytes) -> pathlib.Path:
        return self._folder / key[:1].hex() / key.hex()

    def _digest(self, key: bytes, content: bytes | memoryview) -> bytes:
        h = hashlib.blake2b(self.identity + bytes((len(key),)) + key, digest_size=DIGEST_BYTES)
        h.update(content)
        return h.digest()

    def _find(self) -> None:
        """What an earlier process left; unfinished files are deleted."""
        found: list[tuple[float, bytes, int]] = []
        for path in self._folder.glob("*/*"):
            try:
                key, stat = bytes.fromhex(path.name), path.stat()
            except ValueError:
                path.unlink(missing_ok=True)
                continue
            found.append((stat.st_mtime, key, stat.st_size))
        for _, key, size in sorted(found):
            self._sizes[key] = size
            self._total += size
        self._make_room(0)

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            key, page = item
            try:
                if self._enabled and key not in self._sizes:
                    self._write(key, page)
            except OSError as error:
                self._enabled = False
                log.warning("pages are not kept in %s any more (%s)", self._folder, error.strerror or error)
            finally:
                self._queue.task_done()

    def _write(self, key: bytes, page: HostPage) -> None:
        content = packed([whole(parts, shape) for parts, shape in zip(page, self._shapes, strict=True)])
        size = len(MAGIC) + DIGEST_BYTES + len(content)
        if size > self.capacity:
            return
        self._make_room(size)
        path = self._path(key)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        with unfinished.open("wb") as file:
            file.write(MAGIC + self._digest(key, content))
            file.write(content)
        unfinished.replace(path)
        with self._lock:
            self._sizes[key] = size
            self._total += size
        self.num_written += 1

    def _make_room(self, size: int) -> None:
        while self._sizes and self._total + size > self.capacity:
            self._delete(next(iter(self._sizes)))

    def _forget(self, key: bytes) -> None:
        with self._lock:
            self._total -= self._sizes.pop(key, 0)

    def _delete(self, key: bytes) -> None:
        self._forget(key)
        self._path(key).unlink(missing_ok=True)


class DiskFetching:
    """`Fetching` of pages from files, and from host memory where they are there.

    Args:
        pages: of each page of the sequence in turn: its number, and the keys of all groups that need it.
        host: pages of host memory, by key.
    """

    verified = True  # file by file, as they are read

    def __init__(
        self, tier: DiskTier, pages: Sequence[tuple[int, Sequence[bytes]]], host: Mapping[bytes, Callable[[], HostPage]],
        shapes: Sequence[tuple[int, ...]],
    ) -> None:  # fmt: skip
        self._tier = tier
        self._pages = pages
        self._host = host
        self._shapes = shapes
        self._cancelled = False

    def __iter__(self) -> Iterator[Parcel]:
        for number, keys in self._pages:
            if self._cancelled:
                raise TransferError("aborted")
            yield Parcel(number, b"".join(map(self._content, keys)))

    def cancel(self) -> None:
        """Ends it."""
        self._cancelled = True

    def _content(self, key: bytes) -> bytes:
        page = self._host.get(key)
        if page is None:
            return self._tier.read(key)
        return packed([whole(parts, shape) for parts, shape in zip(page(), self._shapes, strict=True)])
