"""Several engines with the same model as one: who gets which request, and what happens when one of them is lost."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, Protocol

import numpy as np

from serving.engine.api.client import ClassifyingClient, EmbeddingClient, EngineClient, ScoringClient
from serving.engine.api.types import EngineInfo, EngineOutput, EngineRequest, EngineStats, TokenPair
from serving.errors import DIED, ErrorKind, RequestError


class RemoteEngine(Protocol):
    """What the pool needs of a remote engine: an EngineClient whose streams can be closed. Its `info().tasks` says whether
    it embeds, scores and classifies."""

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]: ...

    async def embed(
        self, request_id: str, token_ids: Sequence[int], *, pooling: str | None = None, priority: int = 0
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


_ELSEWHERE = frozenset({ErrorKind.UNAVAILABLE, ErrorKind.RESOURCE_EXHAUSTED})
"""Refusals that another engine may not share."""


def _nobody() -> RequestError:
    return RequestError(ErrorKind.UNAVAILABLE, "No engine behind this gateway answers.", retry_after_s=2.0)


class Pool(EngineClient):
    """Several engines with the same model as one `EngineClient`.

    A request goes to the healthy engine with the least work: the requests that this gateway has there, and those that
    wait there for whomever. Equal ones take turns. A request that an engine refuses before its first token (down,
    draining, full) is tried once on each of the others.

    Raises:
        ValueError: no engine, or engines that serve different models.
    """

    def __init__(self, targets: Sequence[RemoteEngine]) -> None:
        if not targets:
            raise ValueError("A gateway needs at least one target.")
        self._targets: list[RemoteEngine] = []
        self._live: list[int] = []
        self._turn = itertools.count()
        self._info = targets[0].info()
        for target in targets:
            self.add(target)

    def add(self, target: RemoteEngine) -> None:
        """Takes one more engine.

        Raises:
            ValueError: it serves another model than the ones that are here.
        """
        infos = [*(one.info() for one in self._targets), target.info()]
        for name in ("model_id", "vocab_size", "tasks", "labels"):
            values = sorted({str(getattr(info, name)) for info in infos})
            if len(values) > 1:
                raise ValueError(f"The targets differ in {name}: {', '.join(values)}. A gateway serves one model.")
        self._targets.append(target)
        self._live.append(0)
        self._info = dataclasses.replace(
            infos[0],
            max_model_len=min(info.max_model_len for info in infos),
            max_num_seqs=sum(info.max_num_seqs for info in infos),
            num_pages=sum(info.num_pages for info in infos),
        )

    def _order(self) -> list[int]:
        """Healthy targets, the one with the least work first."""
        n, turn = len(self._targets), next(self._turn)
        able = [i for i in range(n) if self._targets[i].healthy]
        return sorted(able, key=lambda i: (self._live[i] + self._targets[i].stats().num_waiting, (i - turn) % n))

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """As EngineClient.generate."""
        failure = _nobody()
        for i in self._order():
            begun = False
            self._live[i] += 1
            try:
                async with contextlib.aclosing(self._targets[i].generate(request)) as outputs:
                    async for output in outputs:
                        begun = True
                        yield output
                return
            except RequestError as error:
                if begun or (error.kind not in _ELSEWHERE and error.code != DIED):
                    raise
                failure = error
            finally:
                self._live[i] -= 1
        raise failure

    async def embed(
        self, request_id: str, token_ids: Sequence[int], *, pooling: str | None = None, priority: int = 0
    ) -> np.ndarray:
        """As EmbeddingClient.embed."""
        return await self._once(lambda t: t.embed(request_id, token_ids, pooling=pooling, priority=priority))

    async def score(self, request_id: str, pairs: Sequence[TokenPair], *, priority: int = 0) -> np.ndarray:
        """As ScoringClient.score."""
        return await self._once(lambda t: t.score(request_id, pairs, priority=priority))

    async def classify(
        self, request_id: str, token_ids: Sequence[int], *, raw: bool = False, priority: int = 0
    ) -> np.ndarray:
        """As ClassifyingClient.classify."""
        return await self._once(lambda t: t.classify(request_id, token_ids, raw=raw, priority=priority))

    async def _once(self, call: Callable[[RemoteEngine], Awaitable[np.ndarray]]) -> np.ndarray:
        """A call with one answer, by the engine with the least work; the others are tried where it refuses."""
        failure = _nobody()
        for i in self._order():
            self._live[i] += 1
            try:
                return await call(self._targets[i])
            except RequestError as error:
                if error.kind not in _ELSEWHERE:
                    raise
                failure = error
            finally:
                self._live[i] -= 1
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
        found = await asyncio.gather(*(t.abort(request_id) for t in self._targets), return_exceptions=True)
        return any(one is True for one in found)

    def info(self) -> EngineInfo:
        return self._info

    def stats(self) -> EngineStats:
        """Sums over the engines; the last step's times are the longest. What the wire does not carry stays unknown."""
        all_stats = [target.stats() for target in self._targets]
        merged: dict[str, Any] = {}
        for field in dataclasses.fields(EngineStats):
            values = [getattr(stats, field.name) for stats in all_stats]
            if any(value is None for value in values):
                merged[field.name] = None
            elif isinstance(values[0], tuple):
                merged[field.name] = tuple(map(sum, zip(*values, strict=True)))
            else:
                merged[field.name] = max(values) if field.name.endswith("_s") else sum(values)
        return EngineStats(**merged)

    @property
    def healthy(self) -> bool:
        return any(target.healthy for target in self._targets)
