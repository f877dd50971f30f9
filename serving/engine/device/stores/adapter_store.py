"""The adapters that this engine knows, by name: read, fitted to the model and kept packed in host memory."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np

from models.adapters.attach import Room
from models.adapters.peft import read_peft
from serving.engine.api.adapters import AdapterInfo


class AdapterStore:
    """Reads adapters and hands their packed matrices out. May be called from any thread.

    Args:
        room: where the model takes adapters; None: nowhere.
        max_cpu_loras: adapters whose matrices stay in host memory; those of others are read again when they are asked for.
    """

    def __init__(self, room: Room | None, max_cpu_loras: int = 16) -> None:
        self._room = room
        self.max_cpu_loras = max_cpu_loras
        self._lock = threading.Lock()
        self._infos: dict[str, AdapterInfo] = {}
        self._packed: OrderedDict[str, np.ndarray] = OrderedDict()  # digest -> matrices, least recently used first
        self._pins: Counter[str] = Counter()

    @property
    def open(self) -> bool:
        """Whether there is room for adapters."""
        return self._room is not None

    def load(self, name: str, path: str, replace: bool = False) -> AdapterInfo:
        """Reads an adapter and registers it.

        Raises:
            ValueError: no room, a name in use, or an adapter that cannot be served here, in a sentence.
        """
        if self._room is None:
            raise ValueError("This server takes no adapters: start it with --enable-lora.")
        with self._lock:
            if name in self._infos and not replace:
                raise ValueError(f"There is an adapter {name!r} already: unload it first, or load it in place.")
        adapter = read_peft(Path(path))
        packed = self._room.pack(adapter)
        digest = adapter.digest().hex()
        info = AdapterInfo(name, path, digest, adapter.rank, len(adapter.pairs))
        with self._lock:
            if name in self._infos and not replace:
                raise ValueError(f"There is an adapter {name!r} already: unload it first, or load it in place.")
            self._infos[name] = info
            self._keep(digest, packed)
        return info

    def unload(self, name: str) -> AdapterInfo:
        """Forgets an adapter's name. Requests that run with it end with it.

        Raises:
            KeyError: there is none of that name.
        """
        with self._lock:
            info = self._infos.pop(name)
            if not self._pins[info.digest] and all(other.digest != info.digest for other in self._infos.values()):
                self._packed.pop(info.digest, None)
            return info

    def infos(self) -> list[AdapterInfo]:
        """In the order in which they were loaded."""
        with self._lock:
            return list(self._infos.values())

    def find(self, name: str) -> AdapterInfo | None:
        with self._lock:
            return self._infos.get(name)

    def pin(self, digest: str) -> None:
        """Keeps an adapter's matrices in host memory until `unpin`, reading them again where they are not.

        Raises:
            ValueError: it was unloaded, or its files have changed or cannot be read any more.
        """
        with self._lock:
            if digest in self._packed:
                self._packed.move_to_end(digest)
                self._pins[digest] += 1
                return
            info = next((info for info in self._infos.values() if info.digest == digest), None)
        if info is None:
            raise ValueError("The adapter was unloaded.")
        if self.load(info.name, info.path, replace=True).digest != digest:
            raise ValueError(f"The files of adapter {info.name!r} have changed: ask again.")
        with self._lock:
            self._pins[digest] += 1

    def unpin(self, digest: str) -> None:
        with self._lock:
            self._pins[digest] -= 1
            if self._pins[digest] <= 0:
                del self._pins[digest]
                if all(info.digest != digest for info in self._infos.values()):
                    self._packed.pop(digest, None)

    def packed(self, digest: str) -> np.ndarray:
        """The matrices of a pinned adapter."""
        with self._lock:
            return self._packed[digest]

    def _keep(self, digest: str, packed: np.ndarray) -> None:
        self._packed[digest] = packed
        self._packed.move_to_end(digest)
        for old in list(self._packed):
            if len(self._packed) <= self.max_cpu_loras:
                break
            if not self._pins[old] and old != digest:
                del self._packed[old]
