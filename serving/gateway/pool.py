"""Several engines with the same model as one: who gets which request, and what happens when one of them is lost."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from serving.engine.api.adapters import AdapterClient, AdapterInfo, AdapterLoad
from serving.engine.api.client import ClassifyingClient, EmbeddingClient, EngineClient, ScoringClient
from serving.engine.api.media import Media
from serving.engine.api.peers.stats import TransferStats
from serving.engine.api.types import EngineInfo, EngineOutput, EngineRequest, EngineStats, TokenPair
from serving.errors import DIED, ErrorKind, RequestError
from serving.gateway.asking import asked_of_task
from serving.gateway.prefills import Note, Prefills
from serving.routing.router import NO_WISH, Route, Router, Visit, Wish
from serving.routing.targets import Target

Answer = TypeVar("Answer")


class RemoteEngine(Protocol):
    """What the pool needs of a remote engine: an EngineClient whose streams can be closed. Its `info().tasks` says whether
    it embeds, scores and classifies."""

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]: ...

    async def embed(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        pooling: str | None = None,
        priority: int = 0,
        adapter: str | None = None,
    ) -> np.ndarray: ...

    async def score(self, request_id: str, pairs: Sequence[TokenPair], *, priority: int = 0) -> np.ndarray: ...

    async def classify(
        self, request_id: str, token_ids: Sequence[int], *, raw: bool = False, priority: int = 0
    ) -> np.ndarray: ...

    async def abort(self, request_id: str) -> bool: ...

    def info(self) -> EngineInfo: ...

    def stats(self) -> EngineStats: ...

    @property
    def healthy(self) -> bool: ...

    @property
    def adapters(self) -> AdapterClient | None: ...


_ELSEWHERE = frozenset({ErrorKind.UNAVAILABLE, ErrorKind.RESOURCE_EXHAUSTED})
"""Refusals that another engine may not share."""


def _nobody() -> RequestError:
    return RequestError(ErrorKind.UNAVAILABLE, "No engine behind this gateway answers.", retry_after_s=2.0)


def _words(senses: frozenset[str]) -> str:
    """'images and videos' of {"image", "video"}."""
    return " and ".join(sense if sense == "audio" else f"{sense}s" for sense in sorted(senses))


def _unread(senses: frozenset[str]) -> RequestError:
    message = (
        f"The prompt has {_words(senses)}; no engine behind this gateway reads that. Send text, or add one that does."
    )
    return RequestError(ErrorKind.INVALID_ARGUMENT, message, param="messages")


@dataclasses.dataclass(slots=True, eq=False)
class Member:
    """One engine of a pool.

    Attributes:
        number: its place among all that ever came: what clients are told of it.
        idle: set while no request of ours is there.
    """

    client: RemoteEngine
    target: Target
    number: int
    idle: asyncio.Event


class Pool(EngineClient):
    """Several engines with the same model as one `EngineClient`.

    The router says where a request goes. One that an engine refuses before its first token (down, draining, full), or loses before
    it, is tried once on each of the others.

    Args:
        router: None makes one with the default policy.
        names: of the targets; None numbers them.
    Raises:
        ValueError: no engine, or engines that serve different models.

    Attributes:
        members: by name.
        objectives: priority of each that requests may name.
        sticky_tenants: whether what names no session belongs to its tenant's.
        prefills: engines that compute prompts for the members.
    """

    def __init__(
        self, targets: Sequence[RemoteEngine], router: Router | None = None, names: Sequence[str] | None = None
    ) -> None:
        if not targets:
            raise ValueError("A gateway needs at least one target.")
        self.router = router or Router()
        self.members: dict[str, Member] = {}
        self.objectives: Mapping[str, int] = {}
        self.sticky_tenants = False
        self.prefills = Prefills()
        self._numbers = itertools.count()
        self._info = targets[0].info()
        for i, target in enumerate(targets):
            self.add(target, names[i] if names else None)

    def add(self, client: RemoteEngine, name: str | None = None) -> None:
        """Takes one more engine.

        Raises:
            ValueError: it serves another model than the ones that are here, or is here already.
        """
        infos = [*(one.client.info() for one in self.members.values()), client.info()]
        for field in ("model_id", "vocab_size", "tasks", "labels"):
            values = sorted({str(getattr(info, field)) for info in (self._info, *infos)})
            if len(values) > 1:
                raise ValueError(f"The targets differ in {field}: {', '.join(values)}. A gateway serves one model.")
        number = next(self._numbers)
        name = name or str(number)
        info = client.info()
        target = self.router.add(name, info.page_size, info.num_pages)
        member = Member(client, target, number, asyncio.Event())
        member.idle.set()
        self.members[name] = member
        self._sum(infos)
        watch = getattr(client, "watch", None)
        if watch is not None:
            watch(lambda: self._told(member), lambda: self.router.forget(name))
        self._told(member)

    def remove(self, name: str) -> Member | None:
        """Sends nothing more there. What runs there goes on: wait for the member's `idle` before closing its client."""
        member = self.members.pop(name, None)
        self.router.remove(name)
        if self.members:
            self._sum([one.client.info() for one in self.members.values()])
        return member

    def _sum(self, infos: Sequence[EngineInfo]) -> None:
        patches = [info.media_patches for info in infos if info.media_patches]
        self._info = dataclasses.replace(
            infos[0],
            max_model_len=min(info.max_model_len for info in infos),
            max_num_seqs=sum(info.max_num_seqs for info in infos),
            num_pages=sum(info.num_pages for info in infos),
            # What one of them reads is taken here, and goes to those alone.
            modalities=tuple(dict.fromkeys(sense for info in infos for sense in info.modalities)),
            media_patches=min(patches, default=0),
        )

    def _told(self, member: Member) -> None:
        member.target.told(member.client.stats())
        member.target.reads = frozenset(member.client.info().modalities)
        adapters = member.client.adapters
        member.target.adapters = frozenset(one.digest for one in (adapters.infos() if adapters is not None else ()))

    def _healthy(self) -> list[Target]:
        found = []
        for member in self.members.values():
            if member.client.healthy:
                if not hasattr(member.client, "watch"):  # an engine in this process: what it says is always new
                    self._told(member)
                found.append(member.target)
        return found

    def route(self, request: EngineRequest, wish: Wish) -> Route:
        """Where a request is to go.

        Raises:
            RequestError: UNAVAILABLE, where nobody answers that could run it.
        """
        if wish.session is None and self.sticky_tenants and request.tenant:
            wish = dataclasses.replace(wish, session=f"tenant {request.tenant}")
        route = self.router.route(request, self._healthy(), wish)
        if route is None:
            raise self._nobody(request)
        return route

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """As EngineClient.generate."""
        asked = asked_of_task.get()
        if asked is not None:
            request = asked.concerned(request, self.objectives)
        route = self.route(request, asked.wish if asked is not None else NO_WISH)
        failure = _nobody()
        for attempt, target in enumerate(route.tries()):
            member = self.members.get(target.name)
            if member is None or member.target is not target:
                continue  # gone meanwhile
            if asked is not None:
                asked.note(route, member.number, target.name, attempt)
            completion: list[int] | None = None  # None: nothing has come
            running, first = target.load, not attempt
            visit = self._begin(route, member)
            try:
                async with self._helped(request, member, route if first else None, running) as (helped, note):
                    if asked is not None and note is not None and note.helper is not None:
                        asked.note_prefill(list(self.prefills.helpers).index(note.helper))
                    async with contextlib.aclosing(member.client.generate(helped)) as outputs:
                        async for output in outputs:
                            if completion is None:
                                completion = []
                                if note is not None:
                                    note.begun()
                            completion += output.token_ids
                            yield output
                return
            except RequestError as error:
                if completion is not None or (error.kind not in _ELSEWHERE and error.code != DIED):
                    raise
                failure = error
                self.router.retries[error.kind.name.lower()] += 1
            finally:
                self._end(visit, member, completion)
        raise failure

    @contextlib.asynccontextmanager
    async def _helped(
        self, request: EngineRequest, member: Member, route: Route | None, running: int
    ) -> AsyncGenerator[tuple[EngineRequest, Note | None], None]:
        """The request as the member is to get it: while somebody else computes its prompt, where that pays; or told which other
        member has a part of it.

        Args:
            route: that led to this member; None where another one was tried before.
        """
        name, info, matched = member.target.name, member.client.info(), route.matched_tokens if route is not None else 0
        if not self.prefills.helpers:
            holder = route.holder if route is not None else None
            if holder is not None and (there := self.members.get(holder[0].name)) is not None and there is not member:
                request = self.prefills.from_holder(request, info, matched, there.client.info(), *holder)
            yield request, None
            return
        async with self.prefills.helped(request, name, info, matched, running) as found:
            yield found

    def _begin(self, route: Route, member: Member) -> Visit:
        member.idle.clear()
        return self.router.begin(route, member.target)

    def _end(self, visit: Visit, member: Member, completion: Sequence[int] | None) -> None:
        self.router.end(visit, completion)
        if not member.target.live:
            member.idle.set()

    def _nobody(self, request: EngineRequest) -> RequestError:
        """Why a request goes nowhere."""
        senses = request.media.senses if request.media is not None else frozenset()
        if senses and not any(one.target.can(None, senses) for one in self.members.values()):
            return _unread(senses)
        what = f"reads {_words(senses)}" if senses else ""
        if request.adapter is not None:
            what = f"{what} and has this adapter" if what else "has this adapter"
        if not what or not self.healthy:
            return _nobody()
        param = "model" if request.adapter is not None else "messages"
        return RequestError(
            ErrorKind.UNAVAILABLE, f"No engine that answers {what} now.", param=param, retry_after_s=2.0
        )

    async def embed(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        pooling: str | None = None,
        priority: int = 0,
        adapter: str | None = None,
        media: Media | None = None,
        cache_salt: str | None = None,
    ) -> np.ndarray:
        """As EmbeddingClient.embed.

        Raises:
            RequestError: UNIMPLEMENTED, for what has images in it.
        """
        if media is not None:
            raise RequestError(
                ErrorKind.UNIMPLEMENTED, "Images are embedded by the engines themselves: ask one of them."
            )
        more = {} if adapter is None else {"adapter": adapter}
        return await self.once(
            lambda t: t.embed(request_id, token_ids, pooling=pooling, priority=priority, **more), adapter
        )

    async def score(self, request_id: str, pairs: Sequence[TokenPair], *, priority: int = 0) -> np.ndarray:
        """As ScoringClient.score."""
        return await self.once(lambda t: t.score(request_id, pairs, priority=priority))

    async def classify(
        self, request_id: str, token_ids: Sequence[int], *, raw: bool = False, priority: int = 0
    ) -> np.ndarray:
        """As ClassifyingClient.classify."""
        return await self.once(lambda t: t.classify(request_id, token_ids, raw=raw, priority=priority))

    async def once(self, call: Callable[[Any], Awaitable[Answer]], adapter: str | None = None) -> Answer:
        """A call with one answer, by the engine with the least work; the others are tried where it refuses."""
        failure = _nobody()
        able = [one for one in self._healthy() if adapter is None or adapter in (one.adapters or ())]
        members = [one for one in self.members.values() if one.target in able]
        for member in sorted(members, key=lambda one: (one.target.load, one.target.routed)):
            member.target.live += 1
            member.target.routed += 1
            member.idle.clear()
            try:
                return await call(member.client)
            except RequestError as error:
                if error.kind not in _ELSEWHERE:
                    raise
                failure = error
                self.router.retries[error.kind.name.lower()] += 1
            finally:
                member.target.live -= 1
                if not member.target.live:
                    member.idle.set()
        raise failure

    @property
    def embedder(self) -> EmbeddingClient:
        """Itself; the engines behind it all do the same."""
        return self

    @property
    def scorer(self) -> ScoringClient:
        """Itself."""
        return self

    @property
    def classifier(self) -> ClassifyingClient:
        """Itself."""
        return self

    async def abort(self, request_id: str) -> bool:
        found = await asyncio.gather(
            *(one.client.abort(request_id) for one in self.members.values()), return_exceptions=True
        )
        return any(one is True for one in found)

    def info(self) -> EngineInfo:
        return self._info

    def stats(self) -> EngineStats:
        """Sums over the engines; the last step's times are the longest. What the wire does not carry stays unknown."""
        all_stats = [one.client.stats() for one in self.members.values()]
        if not all_stats:
            return EngineStats()
        merged: dict[str, Any] = {}
        for field in dataclasses.fields(EngineStats):
            values = [getattr(stats, field.name) for stats in all_stats]
            if field.name == "transfers":
                told = [value for value in values if value is not None]
                merged[field.name] = sum(told, TransferStats()) if told else None
            elif any(value is None for value in values):
                merged[field.name] = None
            elif isinstance(values[0], frozenset):
                merged[field.name] = frozenset().union(*values)
            elif isinstance(values[0], tuple):
                merged[field.name] = tuple(map(sum, zip(*values, strict=True)))
            else:
                merged[field.name] = max(values) if field.name.endswith("_s") else sum(values)
        return EngineStats(**merged)

    @property
    def adapters(self) -> AdapterClient | None:
        """What any of the engines has; None where none takes adapters."""
        each = [one.client.adapters for one in self.members.values()]
        return PoolAdapters([one for one in each if one is not None]) if any(one is not None for one in each) else None

    @property
    def healthy(self) -> bool:
        return any(one.client.healthy for one in self.members.values())


class PoolAdapters(AdapterClient):
    """The adapters of several engines; of one name the first. They are loaded and unloaded there."""

    def __init__(self, each: Sequence[AdapterClient]) -> None:
        self._each = each

    def locate(self, path: str) -> pathlib.Path:
        return self._each[0].locate(path)

    def load(self, name: str, path: str, replace: bool = False, **more: Any) -> AdapterInfo:
        return self._each[0].load(name, path, replace, **more)

    def unload(self, name: str) -> AdapterInfo:
        return self._each[0].unload(name)

    def find(self, name: str) -> AdapterInfo | None:
        return next((one for one in self.infos() if one.name == name), None)

    def infos(self) -> list[AdapterInfo]:
        found = {info.name: info for one in reversed(self._each) for info in one.infos()}
        return list(found.values())

    def load_now(self) -> AdapterLoad | None:
        """Not known here: routers read the engines' own metrics."""
        return None
