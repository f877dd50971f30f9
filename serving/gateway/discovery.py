"""Which engines there are: named by flags, by a name with many addresses, or in a file that somebody keeps up."""

from __future__ import annotations

import asyncio
import logging
import pathlib
import socket
from collections.abc import Iterable, Mapping

log = logging.getLogger("serving.gateway")

DNS = "dns:///"
"""Begins a target that stands for all addresses of its name, as in gRPC."""
MAX_TARGETS = 10_000


class Discovery:
    """Says which targets there are now.

    Args:
        targets: "host:port", or "dns:///host:port" for one target an address of the name (a headless Service).
        file: one target a line, of either kind; empty lines and what follows a `#` do not count. Read again when it has changed.
    Raises:
        ValueError: something that is no target.
    """

    def __init__(self, targets: Iterable[str], file: pathlib.Path | None = None) -> None:
        self._fixed = tuple(dict.fromkeys(targets))
        for one in self._fixed:
            check_target(one)
        self._file = file
        self._listed: tuple[str, ...] = ()
        self._seen: tuple[int, int, int] | None = None
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._complaint: dict[str, str] = {}

    @property
    def changes(self) -> bool:
        """Whether it may say something else later."""
        return self._file is not None or any(one.startswith(DNS) for one in self._fixed)

    def sentence(self) -> str:
        """Where it looks, for people."""
        places = [*self._fixed, *([f"those in {self._file}"] if self._file is not None else [])]
        return ", ".join(places)

    async def names(self) -> Mapping[str, str | None]:
        """The targets' addresses, each with the host that its certificate has to name; None: the address's own. What cannot be
        read or resolved now is what it was before."""
        if self._file is not None:
            await asyncio.to_thread(self._read, self._file)
        found: dict[str, str | None] = {}
        for target in dict.fromkeys((*self._fixed, *self._listed)):
            if not target.startswith(DNS):
                found.setdefault(target, None)
                continue
            host = target.removeprefix(DNS).rpartition(":")[0].strip("[]")
            for address in await self._resolve(target):
                found.setdefault(address, host)
        return dict(list(found.items())[:MAX_TARGETS])

    def _read(self, path: pathlib.Path) -> None:
        try:
            status = path.stat()
            seen = (status.st_mtime_ns, status.st_size, status.st_ino)
            if seen == self._seen:
                return
            lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
            listed = tuple(line for line in lines if line)
            for one in listed:
                check_target(one)
        except (OSError, ValueError) as error:
            self._complain(str(path), f"{path} cannot be used ({error}); the targets stay as they are")
            return
        self._complaint.pop(str(path), None)
        self._listed, self._seen = listed, seen

    async def _resolve(self, target: str) -> tuple[str, ...]:
        host, _, port = target.removeprefix(DNS).rpartition(":")
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except OSError as error:
            self._complain(target, f"{target} does not resolve ({error}); its addresses stay as they are")
            return self._addresses.get(target, ())
        self._complaint.pop(target, None)
        addresses = {f"[{a[0]}]:{a[1]}" if ":" in str(a[0]) else f"{a[0]}:{a[1]}" for *_, a in found}
        self._addresses[target] = tuple(sorted(addresses))
        return self._addresses[target]

    def _complain(self, what: str, sentence: str) -> None:
        if self._complaint.get(what) != sentence:
            self._complaint[what] = sentence
            log.warning("%s", sentence)


def check_target(name: str) -> None:
    """Raises ValueError for what is no "host:port"."""
    host, _, port = name.removeprefix(DNS).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or any(c.isspace() for c in host) or "//" in host:
        raise ValueError(f"{name!r} is no target. It takes host:port, or {DNS}host:port for every address of a name.")
