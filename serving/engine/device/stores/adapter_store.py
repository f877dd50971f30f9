"""The adapters that this engine knows, by name: read, fitted to the model and kept packed in host memory."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.adapters.attach import Room
from models.adapters.read import locate, read_adapter
from serving.engine.api.adapters import AdapterInfo


class _Kept(NamedTuple):
    matrices: np.ndarray  # `Room.pack`
    late: bool  # some of them change logits


class AdapterStore:
    """Reads adapters and hands their packed matrices out. May be called from any thread.

    Args:
        room: where the model takes adapters; None: nowhere.
        max_cpu_loras: adapters whose matrices stay in host memory; those of others are read again when they are asked for.
    Attributes:
        read_base: values of a tensor of the base's checkpoint; None where they cannot be had.
    """

    def __init__(self, room: Room | None, max_cpu_loras: int = 16) -> None:
        self._room = room
        self.max_cpu_loras = max_cpu_loras
        self.read_base: Callable[[str], np.ndarray] | None = None
        self._lock = threading.Lock()
        self._infos: dict[str, AdapterInfo] = {}
        self._within: dict[str, Path | None] = {}  # name -> the folder that its files may not lead out of
        self._packed: OrderedDict[str, _Kept] = OrderedDict()  # by digest, least recently used first
        self._pins: Counter[str] = Counter()

    @property
    def open(self) -> bool:
        """Whether there is room for adapters."""
        return self._room is not None

    def locate(self, path: str) -> Path:
        """See AdapterClient.locate."""
        return locate(path)

    def load(
        self,
        name: str,
        path: str,
        replace: bool = False,
        *,
        within: Path | None = None,
        tenants: tuple[str, ...] | None = None,
    ) -> AdapterInfo:
        """Reads an adapter and registers it; see `AdapterClient.load`.

        Raises:
            ValueError: no room, a name in use, or an adapter that cannot be served here, in a sentence.
        """
        with self._lock:
            self._check_name(name, replace)
        info, kept = self._read(name, path, within, tenants)
        digest = info.digest
        with self._lock:
            self._check_name(name, replace)  # again: two may have been reading at once
            old, self._infos[name], self._within[name] = self._infos.get(name), info, within
            if old is not None:
                self._drop(old.digest)
            self._keep(digest, kept)
        return info

    def unload(self, name: str) -> AdapterInfo:
        """Forgets an adapter's name. Requests that run with it end with it.

        Raises:
            KeyError: there is none of that name.
        """
        with self._lock:
            info = self._infos.pop(name)
            del self._within[name]
            self._drop(info.digest)
            return info

    def infos(self) -> list[AdapterInfo]:
        """In the order in which they were loaded."""
        with self._lock:
            return list(self._infos.values())

    def find(self, name: str) -> AdapterInfo | None:
        with self._lock:
            return self._infos.get(name)

    def pin_kept(self, digest: str) -> bool:
        """Keeps an adapter's matrices in host memory until `unpin`; False where they are not there any more."""
        with self._lock:
            if digest not in self._packed:
                return False
            self._packed.move_to_end(digest)
            self._pins[digest] += 1
            return True

    def pin(self, digest: str) -> None:
        """As `pin_kept`, reading them again where they are not there.

        Raises:
            ValueError: it was unloaded, or its files have changed or cannot be read any more.
        """
        if self.pin_kept(digest):
            return
        with self._lock:
            info = next((info for info in self._infos.values() if info.digest == digest), None)
            within = None if info is None else self._within[info.name]
        if info is None:
            raise ValueError("The adapter was unloaded.")
        found, kept = self._read(info.name, info.path, within, info.tenants)
        with self._lock:
            if self._infos.get(info.name) is not info:
                raise ValueError("The adapter was unloaded.")
            if found.digest != digest:
                raise ValueError(f"The files of adapter {info.name!r} have changed: load it again.")
            self._keep(digest, kept)
            self._pins[digest] += 1

    def unpin(self, digest: str) -> None:
        with self._lock:
            self._pins[digest] -= 1
            if self._pins[digest] <= 0:
                del self._pins[digest]
                self._drop(digest)

    def packed(self, digest: str) -> np.ndarray:
        """The matrices of a pinned adapter."""
        with self._lock:
            return self._packed[digest].matrices

    def _check_name(self, name: str, replace: bool) -> None:
        if name in self._infos and not replace:
            raise ValueError(f"There is an adapter {name!r} already: unload it first, or load it in place.")

    def _read(
        self, name: str, path: str, within: Path | None, tenants: tuple[str, ...] | None
    ) -> tuple[AdapterInfo, _Kept]:
        """An adapter and its matrices as they lie in a slot. Takes its time: not under the lock."""
        if self._room is None:
            raise ValueError("This server takes no adapters: start it with --enable-lora.")
        base = dataclasses.replace(self._room.base, read=self.read_base)
        adapter = read_adapter(Path(path), base, within)
        kept = _Kept(self._room.pack(adapter), self._room.is_late(adapter))
        digest, count = adapter.digest().hex(), len(adapter.pairs)
        return AdapterInfo(name, path, digest, adapter.rank, count, tenants, base=adapter.base), kept

    def is_late(self, digest: str) -> bool:
        """Whether a pinned adapter changes logits, and not only what is computed before them."""
        kept = self._packed.get(digest)
        return kept is not None and kept.late

    @property
    def num_kept(self) -> int:
        """Adapters whose matrices are in host memory."""
        return len(self._packed)

    def _drop(self, digest: str) -> None:
        """Gives up matrices that no name and no request has any more."""
        if digest not in self._pins and all(info.digest != digest for info in self._infos.values()):
            self._packed.pop(digest, None)

    def _keep(self, digest: str, kept: _Kept) -> None:
        self._packed[digest] = kept
        self._packed.move_to_end(digest)
        for old in list(self._packed):
            if len(self._packed) <= self.max_cpu_loras:
                break
            if old not in self._pins and old != digest:
                del self._packed[old]
