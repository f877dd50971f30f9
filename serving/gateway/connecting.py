"""Waiting for engines that are not there yet, or still load: one task each, which says what it waits for; and following which
engines there are."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from serving.access import ClientTls
from serving.errors import ErrorKind, RequestError
from serving.frontends.grpc.client import RemoteEngineClient
from serving.gateway.discovery import Discovery
from serving.gateway.pool import Member

log = logging.getLogger("serving.gateway")

TRY_S = 5.0  # for one attempt: long enough for a busy engine, short enough to say something
AGAIN_S = 1.0
REMIND_S = 60.0
"""How often to say again what is waited for, while nothing about it changes."""
LEAVE_S = 600.0
"""How long requests may go on at an engine that is no target any more."""

_WORDS = {ErrorKind.DEADLINE_EXCEEDED: "it does not answer"}

FOR_EVER = frozenset({ErrorKind.UNAUTHENTICATED, ErrorKind.PERMISSION_DENIED, ErrorKind.UNIMPLEMENTED})
"""Answers that waiting does not change: no or a wrong key, and something else than our server at that address."""


class Connector:
    """Connects to engines as they become ready, and leaves those that are targets no more.

    Args:
        targets: "host:port" of each, or where to look for them.
        on_ready: called with each client once; what it raises (ValueError) is told, and that engine is left alone.
        on_gone: called with the name of one that is a target no more; gives what is to be waited for before it is closed.
        look_s: how often to look whether there are others.

    Attributes:
        waiting_for: the engines that are not connected, each with the reason in words.
    """

    def __init__(
        self,
        targets: list[str] | Discovery,
        on_ready: Callable[[str, RemoteEngineClient], None],
        api_key: str | None = None,
        tls: ClientTls | None = None,
        say: Callable[[str], None] = log.warning,
        connect: Callable[..., Awaitable[RemoteEngineClient]] = RemoteEngineClient.connect,
        on_gone: Callable[[str], Member | None] = lambda name: None,
        look_s: float = 5.0,
    ) -> None:
        self._discovery = targets if isinstance(targets, Discovery) else Discovery(targets)
        self._on_ready = on_ready
        self._on_gone = on_gone
        self._reach = {"api_key": api_key, "tls": tls, "timeout_s": TRY_S}
        self._say = say
        self._connect = connect
        self._look_s = look_s
        self.waiting_for: dict[str, str] = {}
        self._clients: dict[str, RemoteEngineClient] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._follower: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Looks for targets and begins to try them, in the running event loop."""
        self.update(await self._discovery.names())
        if self._discovery.changes:
            self._follower = asyncio.create_task(self._follow())

    def update(self, names: Mapping[str, str | None]) -> None:
        """Takes on targets that are new, and leaves those that are no more."""
        for name in [one for one in self._tasks if one not in names]:
            self._leave(name)
        for name, host in names.items():
            if name not in self._tasks:
                self.waiting_for[name] = "it has not answered yet"
                self._tasks[name] = asyncio.create_task(self._reach_one(name, host))

    async def settled(self) -> None:
        """Returns when no engine is tried any more, and none will be. Raises what nobody expected. Who waits here may give it up:
        the engines are tried all the same."""
        tasks = [self._follower] if self._follower is not None else list(self._tasks.values())
        if tasks:
            done, _ = await asyncio.wait(tasks)  # not gather, which would take the tasks with it when it is cancelled
            for task in done:
                if not task.cancelled():
                    task.result()

    def sentence(self) -> str:
        """What is waited for, for people."""
        if not self.waiting_for and not self._clients:
            return f"There is no target: {self._discovery.sentence()} names none."
        return " ".join(f"No engine at {name}: {why}." for name, why in self.waiting_for.items())

    async def close(self) -> None:
        """Stops trying and closes every connection."""
        tasks = [*self._tasks.values(), *self._leaving, *([self._follower] if self._follower else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in self._clients.values():
            await client.close()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._look_s)
            self.update(await self._discovery.names())

    def _leave(self, name: str) -> None:
        self._tasks.pop(name).cancel()
        self.waiting_for.pop(name, None)
        member, client = self._on_gone(name), self._clients.pop(name, None)
        if client is None:
            return
        self._say(f"the engine at {name} is no target any more")
        task = asyncio.create_task(_close_when_idle(client, member))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _reach_one(self, name: str, host: str | None) -> None:
        said, said_at = "", 0.0
        more = {"tls_name": host} if host is not None and self._reach["tls"] is not None else {}
        while True:
            try:
                client = await self._connect(name, **self._reach, **more)
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
        self._clients[name] = client
        try:
            self._on_ready(name, client)
        except ValueError as error:
            self.waiting_for[name] = str(error).rstrip(".")
            self._say(f"the engine at {name} is left out: {error}")
            return
        del self.waiting_for[name]
        if said:
            self._say(f"the engine at {name} is there")


async def _close_when_idle(client: RemoteEngineClient, member: Member | None) -> None:
    try:
        if member is not None:
            async with asyncio.timeout(LEAVE_S):
                await member.idle.wait()
    except TimeoutError:
        log.warning("an engine that is no target any more still had requests after %d s", LEAVE_S)
    finally:
        await client.close()
