"""Waiting for engines that are not there yet, or still load: one task each, which says what it waits for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from serving.access import ClientTls
from serving.errors import ErrorKind, RequestError
from serving.frontends.grpc.client import RemoteEngineClient

log = logging.getLogger("serving.gateway")

TRY_S = 5.0  # for one attempt: long enough for a busy engine, short enough to say something
AGAIN_S = 1.0
REMIND_S = 60.0
"""How often to say again what is waited for, while nothing about it changes."""

_WORDS = {ErrorKind.DEADLINE_EXCEEDED: "it does not answer"}

FOR_EVER = frozenset({ErrorKind.UNAUTHENTICATED, ErrorKind.PERMISSION_DENIED, ErrorKind.UNIMPLEMENTED})
"""Answers that waiting does not change: no or a wrong key, and something else than our server at that address."""


class Connector:
    """Connects to engines as they become ready.

    Args:
        names: "host:port" of each.
        on_ready: called with each client once; what it raises (ValueError) is told, and that engine is left alone.

    Attributes:
        waiting_for: the engines that are not connected, each with the reason in words.
    """

    def __init__(
        self,
        names: list[str],
        on_ready: Callable[[str, RemoteEngineClient], None],
        api_key: str | None = None,
        tls: ClientTls | None = None,
        say: Callable[[str], None] = log.warning,
        connect: Callable[..., Awaitable[RemoteEngineClient]] = RemoteEngineClient.connect,
    ) -> None:
        self._on_ready = on_ready
        self._reach = {"api_key": api_key, "tls": tls, "timeout_s": TRY_S}
        self._say = say
        self._connect = connect
        self.waiting_for = dict.fromkeys(names, "it has not answered yet")
        self._clients: list[RemoteEngineClient] = []
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to try, in the running event loop."""
        self._tasks = [asyncio.create_task(self._reach_one(name)) for name in list(self.waiting_for)]

    async def settled(self) -> None:
        """Returns when no engine is tried any more. Raises what nobody expected."""
        await asyncio.gather(*self._tasks)

    def sentence(self) -> str:
        """What is waited for, for people."""
        return " ".join(f"No engine at {name}: {why}." for name, why in self.waiting_for.items())

    async def close(self) -> None:
        """Stops trying and closes every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for client in self._clients:
            await client.close()

    async def _reach_one(self, name: str) -> None:
        said, said_at = "", 0.0
        while True:
            try:
                client = await self._connect(name, **self._reach)
                break
            except RequestError as error:
                why = _WORDS.get(error.kind, error.message.rstrip("."))
                final = error.kind in FOR_EVER
            self.waiting_for[name] = why
            if why != said or time.monotonic() - said_at > REMIND_S:
                said, said_at = why, time.monotonic()
                self._say(f"the engine at {name}: {why}; " + ("it is left out" if final else "waiting for it"))
            if final:
                return
            await asyncio.sleep(AGAIN_S)
        self._clients.append(client)
        try:
            self._on_ready(name, client)
        except ValueError as error:
            self.waiting_for[name] = str(error).rstrip(".")
            self._say(f"the engine at {name} is left out: {error}")
            return
        del self.waiting_for[name]
        if said:
            self._say(f"the engine at {name} is there")
