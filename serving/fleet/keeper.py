"""Who is loaded: requests ask for a model and wait; one change at a time makes room and loads it.

All of it runs on the server's event loop, but for what a `Member` says to block, which runs in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from serving.engine.api.client import Where
from serving.engine.device.sizing import in_words
from serving.errors import ErrorKind, RequestError
from serving.fleet.member import Member
from serving.fleet.room import NoRoomError, next_turn_end, who_leaves

log = logging.getLogger(__name__)

T = TypeVar("T")
RETRY_AFTER_S = 5.0


class _Want:
    """Requests that wait for one model. `done` gets why they wait in vain, or None."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.done: asyncio.Future[RequestError | None] = asyncio.get_running_loop().create_future()
        self.waiting = 0


class Keeper:
    """Keeps the members of a fleet within their memory.

    Args:
        memory: bytes that loaded members take together at most.
        wait_s: how long a request waits.
        turn_s: how long a busy member stays before it gives way to one that is waited for.
        say: told what happens, one line each.

    Attributes:
        seconds: of each change so far that loaded or woke a member: (name, kind, seconds), the newest last; the last 256.
    """

    def __init__(
        self,
        members: Sequence[Member],
        memory: int,
        *,
        wait_s: float,
        turn_s: float,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.members = tuple(members)
        self.memory = memory
        self.wait_s = wait_s
        self._turn_s = turn_s
        self._say = say
        self._wants: dict[str, _Want] = {}  # in the order in which they came
        self._changed = asyncio.Event()
        self._change = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        # One thread for all changes: each that allocates much keeps some of it.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="fleet")
        self.seconds: list[tuple[str, str, float]] = []

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    def start(self) -> None:
        """Begins, on the running event loop."""
        self._task = asyncio.create_task(self._run(), name="fleet-keeper")

    async def stop(self) -> None:
        """Makes no further changes. Whoever waits is refused."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for want in list(self._wants.values()):
            self._settle(want, RequestError(ErrorKind.UNAVAILABLE, "The server is shutting down; ask another replica."))

    # -- what requests ask ---------------------------------------------------------------------------------------------

    async def ready(self, member: Member, limit_s: float | None = None) -> None:
        """Returns once a member takes requests.

        Args:
            limit_s: how long to wait; None: `wait_s`.
        Raises:
            RequestError: RESOURCE_EXHAUSTED: it does not fit; UNAVAILABLE: the wait is over, or it could not be loaded.
        """
        if member.ready:
            return
        want = self._want(member)
        want.waiting += 1
        limit = self.wait_s if limit_s is None else min(limit_s, self.wait_s)
        try:
            async with asyncio.timeout(limit):
                error = await asyncio.shield(want.done)
        except TimeoutError:
            raise RequestError(
                ErrorKind.UNAVAILABLE,
                f"The model {member.name!r} was not ready within {limit:g} s ({self.progress(member) or 'it is loaded now'}). Ask "
                "again; --model-wait says how long requests wait.",
                code="model_not_ready",
                retry_after_s=RETRY_AFTER_S,
            ) from None
        finally:
            want.waiting -= 1
            self._changed.set()
        if error is not None:
            raise RequestError(error.kind, error.message, code=error.code, retry_after_s=error.retry_after_s)

    def note(self) -> None:
        """A member has gone idle, or may go: looks at all again, soon."""
        if self._wants or any(one.idle_s is not None for one in self.members):
            self._changed.set()

    def progress(self, member: Member) -> str | None:
        """What requests for a member wait for; None where for nothing."""
        if member.ready:
            return None
        if member.where in (Where.LOADING, Where.WAKING):
            return f"{member.name} is {member.where.value}" + (f": {member.said}" if member.said else "")
        if member.name in self._wants:
            place = list(self._wants).index(member.name) + 1
            return f"{member.name} is {member.where.value} and number {place} of those that wait to be loaded"
        return None

    # -- what admins ask -----------------------------------------------------------------------------------------------

    async def sleep(self, member: Member) -> None:
        """Puts a member to sleep, whoever asks for it."""
        async with self._change:
            if member.ready:
                await self._put_to_sleep(member)
        self._changed.set()

    async def unload(self, member: Member) -> None:
        """Forgets a member's engine.

        Raises:
            RequestError: FAILED_PRECONDITION: requests run with it.
        """
        async with self._change:
            if member.in_use:
                raise RequestError(
                    ErrorKind.FAILED_PRECONDITION,
                    f"{member.in_use} requests run with {member.name!r} or wait for it: wait until they end, or have it sleep.",
                )
            member.where = Where.UNLOADED
            await self._in_thread(member.drop)
        self._changed.set()

    # -- what happens --------------------------------------------------------------------------------------------------

    def _want(self, member: Member) -> _Want:
        want = self._wants.get(member.name)
        if want is None:
            want = self._wants[member.name] = _Want(member)
            self._changed.set()
        return want

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            pause = await self._round()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._changed.wait()

    async def _round(self) -> float | None:
        """Makes at most one change for whoever waits the longest; then has those sleep that nobody has asked for. Returns seconds
        until something is to be done again, or None."""
        for name, want in list(self._wants.items()):
            if want.member.ready:
                self._settle(want, None)
            elif not want.waiting and not want.member.in_use and name in self._wants:
                self._settle(want, None)  # whoever asked has gone
        for want in list(self._wants.values())[:1]:
            async with self._change:
                if want.member.ready:
                    self._changed.set()
                    return None
                pause = await self._serve(want)
            if pause is not None:
                return pause
            self._changed.set()
        return await self._idle()

    async def _serve(self, want: _Want) -> float | None:
        """Makes room for a member and loads it. Returns how long to wait for room, or None when done."""
        member, now = want.member, time.monotonic()
        residents = [one.resident() for one in self.members if one is not member]
        try:
            leaving = who_leaves(member.missing, self.memory - member.bytes, residents, now=now, turn_s=self._turn_s)
        except NoRoomError as error:
            self._settle(want, self._too_large(member, error.fixed))
            return None
        if leaving is None:
            turn = next_turn_end(residents, now=now, turn_s=self._turn_s)
            return 1.0 if turn is None else turn + 0.001
        for one in self.members:
            if one.name in leaving:
                await self._put_to_sleep(one)
        self._settle(want, await self._bring(member))
        return None

    async def _bring(self, member: Member) -> RequestError | None:
        """Loads or wakes a member; the error, where it cannot be."""
        wakes = member.where is Where.SLEEPING and member.engine is not None and member.engine.failure is None
        member.where = Where.WAKING if wakes else Where.LOADING
        began = time.monotonic()
        try:
            await self._in_thread(member.wake if wakes else lambda: member.load(self._say))
        except Exception as error:
            if not isinstance(error, ValueError | OSError | RequestError):
                log.exception("the model %s could not be loaded", member.name)
            member.where, member.error = Where.FAILED, "it could not be loaded; the server's log says why."
            await self._in_thread(member.drop)
            self._say(f"{member.name} could not be {'woken' if wakes else 'loaded'}: {error}")
            return RequestError(
                ErrorKind.UNAVAILABLE, f"The model {member.name!r} could not be loaded; the server's log says why.",
                code="model_not_loaded", retry_after_s=RETRY_AFTER_S,
            )  # fmt: skip
        member.where, member.error = Where.LOADED, None
        member.switches += 1
        member.since = member.used = time.monotonic()
        seconds = member.since - began
        self.seconds = [*self.seconds[-255:], (member.name, "wake" if wakes else "load", seconds)]
        self._say(f"{member.name} is {'awake' if wakes else 'loaded'} after {seconds:.1f} s, {in_words(member.bytes)}")
        return None

    async def _put_to_sleep(self, member: Member) -> None:
        """Requests that run with it wait, and have it woken again in their turn."""
        member.where = Where.SLEEPING
        try:
            await self._in_thread(member.sleep)
        except RequestError as error:  # it cannot sleep (several processes, no weights to read again): then it goes
            log.warning("%s cannot sleep (%s): its engine is ended", member.name, error)
            member.where = Where.UNLOADED
            await self._in_thread(member.drop)
        self._say(f"{member.name} is {member.where.value}")
        if member.in_use:
            self._want(member)

    async def _idle(self) -> float | None:
        """Has those sleep whose time without requests is over. Returns seconds until the next one's is."""
        soonest: float | None = None
        for one in self.members:
            if one.idle_s is None or not one.ready or one.in_use or one.pinned:
                continue
            left = one.used + one.idle_s - time.monotonic()
            if left <= 0:
                async with self._change:
                    if one.ready and not one.in_use:
                        await self._put_to_sleep(one)
                continue
            soonest = left if soonest is None else min(soonest, left)
        return None if soonest is None else soonest + 0.001

    def _settle(self, want: _Want, error: RequestError | None) -> None:
        self._wants.pop(want.member.name, None)
        if not want.done.done():
            want.done.set_result(error)

    def _too_large(self, member: Member, fixed: int) -> RequestError:
        stays = f", of which {in_words(fixed)} are taken by pinned models" if fixed else ""
        return RequestError(
            ErrorKind.RESOURCE_EXHAUSTED,
            f"The model {member.name!r} needs {in_words(member.need)}, and all models may take {in_words(self.memory)}{stays}: "
            "raise --models-memory, or lower its kv_cache_memory.",
            code="model_too_large",
        )
