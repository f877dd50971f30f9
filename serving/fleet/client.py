"""The engine of a member as its service sees it: there all the time, and asked for when it is not loaded."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, cast

import numpy as np

from serving.engine.api.adapters import AdapterClient
from serving.engine.api.client import ClassifyingClient, EmbeddingClient, EngineClient, ScoringClient, Where
from serving.engine.api.lifecycle import Lifecycle
from serving.engine.api.page_events import PageEvents
from serving.engine.api.peers.transfers import PageSource
from serving.engine.api.types import EngineInfo, EngineOutput, EngineRequest, EngineStats, FinishReason, TokenPair
from serving.errors import ErrorKind, RequestError
from serving.fleet.keeper import Keeper
from serving.fleet.member import Member


class MemberClient(EngineClient):
    """EngineClient, and `Residence`, of one member. Belongs to the server's event loop."""

    def __init__(self, member: Member, keeper: Keeper) -> None:
        self._member = member
        self._keeper = keeper
        self._asked_to_end: dict[str, asyncio.Event] = {}  # requests that wait for the model

    # -- requests ------------------------------------------------------------------------------------------------------

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """See EngineClient.generate. The request waits until the model is loaded."""
        with self._using():
            while True:
                if not self._member.ready and not await self._wait(request):
                    yield EngineOutput(request.request_id, finish_reason=FinishReason.ABORT)
                    return
                begun = False
                stream = cast(AsyncGenerator[EngineOutput, None], self._member.client.generate(request))
                try:
                    async with contextlib.aclosing(stream):
                        async for output in stream:
                            begun = True
                            yield output
                    return
                except RequestError as error:
                    if begun or not self._fell_asleep(error):
                        raise

    async def embed(self, request_id: str, token_ids: Sequence[int], **options: Any) -> np.ndarray:
        """See EmbeddingClient.embed."""
        return await self._read("embedder", "embed", request_id, token_ids, **options)

    async def score(self, request_id: str, pairs: Sequence[TokenPair], **options: Any) -> np.ndarray:
        """See ScoringClient.score."""
        return await self._read("scorer", "score", request_id, pairs, **options)

    async def classify(self, request_id: str, token_ids: Sequence[int], **options: Any) -> np.ndarray:
        """See ClassifyingClient.classify."""
        return await self._read("classifier", "classify", request_id, token_ids, **options)

    async def abort(self, request_id: str) -> bool:
        """See EngineClient.abort."""
        if (waiting := self._asked_to_end.get(request_id)) is not None:
            waiting.set()
            return True
        return self._member.engine is not None and await self._member.client.abort(request_id)

    async def _read(self, of: str, what: str, *args: Any, **options: Any) -> np.ndarray:
        with self._using():
            while True:
                await self._keeper.ready(self._member)
                try:
                    return await getattr(getattr(self._member.client, of), what)(*args, **options)
                except RequestError as error:
                    if not self._fell_asleep(error):
                        raise

    async def _wait(self, request: EngineRequest) -> bool:
        """Waits for the model, no longer than the request may. False where somebody ended the request meanwhile."""
        ended = self._asked_to_end[request.request_id] = asyncio.Event()
        ends = [at for at in (request.deadline, request.ttft_deadline) if at is not None]
        limit = None if not ends else max(0.0, min(ends) - time.monotonic())
        tasks = [
            asyncio.ensure_future(self._keeper.ready(self._member, limit)),
            asyncio.ensure_future(ended.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if ended.is_set():
                return False
            with _told_as_deadline(ends):
                tasks[0].result()
            return True
        finally:
            del self._asked_to_end[request.request_id]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _fell_asleep(self, error: RequestError) -> bool:
        """Whether the engine refused because the model has just gone: then the request asks for it again."""
        return error.kind is ErrorKind.UNAVAILABLE and self._member.where in (
            Where.SLEEPING,
            Where.UNLOADED,
            Where.WAKING,
        )

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        try:
            with self._member.using():
                yield
        finally:
            if not self._member.in_use:
                self._keeper.note()

    # -- facts ---------------------------------------------------------------------------------------------------------

    def info(self) -> EngineInfo:
        engine = self._member.engine
        return self._member.info if engine is None else engine.client.info()

    def stats(self) -> EngineStats:
        return self._member.stats

    @property
    def healthy(self) -> bool:
        """A model whose engine died is loaded again when it is asked for."""
        return True

    @property
    def lifecycle(self) -> Lifecycle | None:
        """Pausing and new weights, while there is an engine. Sleep is the residence's."""
        engine = self._member.engine
        return None if engine is None else engine.lifecycle

    @property
    def embedder(self) -> EmbeddingClient | None:
        """Itself: a model that generates has vectors too."""
        return self if {"generate", "embed"} & set(self._member.info.tasks) else None

    @property
    def scorer(self) -> ScoringClient | None:
        """Itself, where the model scores."""
        return self if "score" in self._member.info.tasks else None

    @property
    def classifier(self) -> ClassifyingClient | None:
        """Itself, where the model classifies."""
        return self if "classify" in self._member.info.tasks else None

    @property
    def adapters(self) -> AdapterClient | None:
        """Of its engine, while there is one."""
        return None if self._member.engine is None else self._member.client.adapters

    @property
    def page_events(self) -> PageEvents | None:
        return None if self._member.engine is None else self._member.client.page_events

    @property
    def page_source(self) -> PageSource | None:
        return None if self._member.engine is None else self._member.client.page_source

    @property
    def residence(self) -> MemberClient:
        """Itself."""
        return self

    # -- serving.engine.api.residence.Residence --------------------------------------------------------------------------

    @property
    def where(self) -> Where:
        member = self._member
        return Where.FAILED if member.where is Where.LOADED and not member.ready else member.where

    @property
    def progress(self) -> str | None:
        return self._keeper.progress(self._member)

    @property
    def error(self) -> str | None:
        engine = self._member.engine
        died = engine is not None and engine.failure is not None
        return "its engine died; the log says why." if died else self._member.error

    @property
    def pinned(self) -> bool:
        return self._member.pinned

    @property
    def aliases(self) -> tuple[str, ...]:
        return self._member.entry.aliases

    @property
    def device_bytes(self) -> int:
        return self._member.bytes

    @property
    def idle_until_s(self) -> float | None:
        member = self._member
        if member.idle_s is None or member.pinned:
            return None
        return member.idle_s if member.in_use else max(0.0, member.used + member.idle_s - time.monotonic())

    async def load(self) -> None:
        with self._using():
            await self._keeper.ready(self._member)

    async def sleep(self) -> None:
        await self._keeper.sleep(self._member)

    async def unload(self) -> None:
        await self._keeper.unload(self._member)

    def pin(self, pinned: bool) -> None:
        self._member.pinned = pinned
        self._keeper.note()

    def keep(self, seconds: float | None) -> None:
        self._member.idle_s = seconds
        self._keeper.note()


@contextlib.contextmanager
def _told_as_deadline(ends: Sequence[float]) -> Iterator[None]:
    """A wait that ended with the request's own time is told so."""
    try:
        yield
    except RequestError as error:
        if ends and time.monotonic() >= min(ends) - 0.001:
            raise RequestError(ErrorKind.DEADLINE_EXCEEDED, error.message, code="deadline_exceeded") from error
        raise
