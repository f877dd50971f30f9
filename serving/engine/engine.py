"""An engine that generates, put together from a runner and a scheduler; and its in-process client."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.embedding_head import EmbeddingHead
from serving.engine.api.adapters import AdapterInfo, AdapterLoad
from serving.engine.api.admission import check_door, check_queue
from serving.engine.api.client import EmbeddingClient, EngineClient
from serving.engine.api.config import EngineConfig
from serving.engine.api.lifecycle import Lifecycle, LoadModel
from serving.engine.api.media import Media
from serving.engine.api.mortal import Mortal
from serving.engine.api.page_events import PageEvents
from serving.engine.api.peers.transfers import PageSource
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.streams import OutputStream
from serving.engine.api.types import EngineInfo, EngineOutput, EngineRequest, EngineStats, FinishReason
from serving.engine.lifecycle import Resting
from serving.engine.loop import Abort, Call, EngineLoop, Submit
from serving.errors import ErrorKind, RequestError, invalid

log = logging.getLogger(__name__)


class Engine(Mortal):
    """An engine over compiled programs; it runs once its loop is started. `serving.boot.start` makes one from a configuration.

    Attributes:
        client: the in-process EngineClient.
        source: where the model came from (the tokenizer and chat template are built from it by the text side).
        generation_config: the checkpoint's own sampling defaults.
        failure: what killed the engine, or None.
        lifecycle: pausing, sleeping, new weights.
    """

    def __init__(
        self,
        config: EngineConfig,
        loaded: Any,
        runner: Any,
        scheduler: Any,
        info: EngineInfo,
        load_model: LoadModel | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.source = loaded.source
        self.generation_config: dict[str, Any] = loaded.generation_config
        self.embedding: EmbeddingHead = loaded.embedding
        self.runner = runner
        self.scheduler = scheduler
        self.loop = EngineLoop(
            scheduler, runner, self._deliver, self._reject, self.declare_dead, asynchronous=config.async_scheduling
        )
        self.lifecycle = Lifecycle(Resting(self.loop, scheduler, runner.executor, self._use_head), load_model)
        self.page_events: PageEvents | None = None
        self.stop_telling: Callable[[], None] | None = None
        self.page_source: PageSource | None = None
        self.stop_peers: Callable[[], None] | None = None
        self.client = InProcessClient(self, info)

    def drain(self, timeout: float | None) -> bool:
        """Refuses new requests and waits for the running ones. True if none is left."""
        self.client.draining = True
        end = None if timeout is None else time.monotonic() + timeout
        while self.client.num_live and self.failure is None:
            if end is not None and time.monotonic() >= end:
                return False
            time.sleep(0.02)
        return True

    def shutdown(self, timeout: float = 30.0) -> None:
        """Stops the thread and ends what still runs with UNAVAILABLE."""
        self.client.draining = True
        self.loop.stop(timeout)
        self.client.fail_all(RequestError(ErrorKind.UNAVAILABLE, "the server has stopped."))
        self.runner.guard.close()
        for stop in (self.stop_telling, self.stop_peers):
            if stop is not None:
                stop()

    def tell_pages(self, events: PageEvents, stop: Callable[[], None]) -> None:
        """Has a log that the scheduler writes to be followed through the client; `stop` ends it with the engine."""
        self.page_events, self.stop_telling = events, stop

    def call(self, function: Callable[[], Any], timeout: float = 60.0) -> Any:
        """Runs a function on the engine thread between two steps and returns its result."""
        return self.loop.call(function, timeout)

    def _use_head(self, head: EmbeddingHead) -> None:
        self.embedding = head
        self.client.use_head(head)

    def _deliver(self, outputs: list[EngineOutput]) -> None:
        self.client.deliver(outputs)

    def _reject(self, request_id: str, error: RequestError) -> None:
        self.client.fail(request_id, error)

    def wrap_runner(self, wrap: Callable[[Any], Any]) -> None:
        """Puts something around what carries steps out (faults on purpose)."""
        self.loop.runner = wrap(self.loop.runner)

    @property
    def recent(self) -> Iterable[Any]:
        """The last steps, for a crash report."""
        return self.loop.recent

    @property
    def busy_since(self) -> float | None:
        """See EngineLoop.busy_since."""
        return self.loop.busy_since


class EngineAdapters:
    """`AdapterClient` of an engine in this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.runner.adapters

    def locate(self, path: str) -> Path:
        """See AdapterClient.locate."""
        return self._store.locate(path)

    def load(
        self,
        name: str,
        path: str,
        replace: bool = False,
        *,
        within: Path | None = None,
        tenants: tuple[str, ...] | None = None,
    ) -> AdapterInfo:
        """See AdapterClient.load."""
        return self._store.load(name, path, replace, within=within, tenants=tenants)

    def unload(self, name: str) -> AdapterInfo:
        """See AdapterClient.unload."""
        info = self._store.unload(name)
        self._engine.call(lambda: self._engine.scheduler.adapters.forget(info.digest))
        return info

    def find(self, name: str) -> AdapterInfo | None:
        return self._store.find(name)

    def infos(self) -> list[AdapterInfo]:
        return self._store.infos()

    def load_now(self) -> AdapterLoad:
        """See AdapterClient.load_now."""
        stats, infos = self._engine.loop.stats, self._store.infos()
        running, waiting = (
            tuple(info.name for info in infos if info.digest in digests)
            for digests in (stats.running_adapters, stats.waiting_adapters)
        )
        return AdapterLoad(running, waiting, self._engine.config.max_loras)


class InProcessClient(EngineClient):
    """EngineClient and EmbeddingClient over an engine in this process. Event loops call it; the engine thread answers."""

    def __init__(self, engine: Engine, info: EngineInfo) -> None:
        self._engine = engine
        self._info = info
        self._lock = threading.Lock()
        self._streams: dict[str, OutputStream] = {}
        self._queued_tokens: dict[str, int] = {}  # live requests without a token yet -> prompt tokens
        self.draining = False

    @property
    def num_live(self) -> int:
        return len(self._streams)

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """See EngineClient.generate."""
        stream = OutputStream(asyncio.get_running_loop())
        await self._pin(request)
        try:
            self._open(request, stream)
            finished = False
            try:
                async for output in stream:
                    finished = output.finish_reason is not None
                    yield output
            finally:
                self._close(request.request_id)
                if not finished:
                    self._engine.loop.inbox.put(Abort(request.request_id))
        finally:
            if (
                request.adapter is not None
            ):  # on the engine thread, behind the abort: until that is read it may come to run
                self._engine.loop.inbox.put(Call(lambda: self._engine.runner.adapters.unpin(request.adapter)))

    async def _pin(self, request: EngineRequest) -> None:
        """Sees to it that a request's adapter is in host memory, from which the engine takes it to the devices."""
        adapters = self._engine.runner.adapters
        if request.adapter is None or adapters.pin_kept(request.adapter):
            return
        reading = asyncio.ensure_future(asyncio.to_thread(adapters.pin, request.adapter))
        try:
            await asyncio.shield(reading)
        except (ValueError, OSError) as error:
            raise RequestError(ErrorKind.NOT_FOUND, str(error), param="model") from error
        except asyncio.CancelledError:  # the thread goes on
            digest = request.adapter
            reading.add_done_callback(lambda done: None if done.exception() else adapters.unpin(digest))
            raise

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
        """See EmbeddingClient.embed; of the hidden states after the final norm.

        Args:
            media: images whose embeddings stand in some of its places; see `EngineRequest`.
            cache_salt: who may share its prefix.
        """
        pooling = pooling or self._info.pooling
        if pooling not in ("last", "mean"):
            raise invalid(f"pooling must be 'last' or 'mean', got {pooling!r}.", "pooling")
        request = EngineRequest(
            request_id,
            tuple(token_ids),
            SamplingParams(temperature=0, max_tokens=1),
            priority=priority,
            arrival_time=time.monotonic(),
            pooling=pooling,
            adapter=adapter,
            media=media,
            cache_salt=cache_salt,
        )
        async for output in self.generate(request):
            if output.pooled is not None:
                return self._engine.embedding.finish(output.pooled)
            if output.finish_reason is FinishReason.DEADLINE:
                raise RequestError(ErrorKind.DEADLINE_EXCEEDED, "the embedding was not ready in time.")
        raise RequestError(ErrorKind.INTERNAL, "the request ended without an embedding.")

    async def abort(self, request_id: str) -> bool:
        """See EngineClient.abort."""
        if request_id not in self._streams:
            return False
        self._engine.loop.inbox.put(Abort(request_id, FinishReason.ABORT))
        return True

    def info(self) -> EngineInfo:
        return self._info

    def use_head(self, head: EmbeddingHead) -> None:
        """`info()` says from now on how another checkpoint makes embeddings."""
        self._info = dataclasses.replace(self._info, **head.facts())

    def stats(self) -> EngineStats:
        return self._engine.loop.stats

    @property
    def healthy(self) -> bool:
        return self._engine.failure is None

    @property
    def lifecycle(self) -> Lifecycle:
        """Pausing, sleeping, new weights."""
        return self._engine.lifecycle

    @property
    def embedder(self) -> EmbeddingClient:
        """Itself: vectors of hidden states."""
        return self

    @property
    def adapters(self) -> EngineAdapters | None:
        """What loads and lists adapters; None where the engine takes none."""
        return EngineAdapters(self._engine) if self._engine.runner.adapters.open else None

    @property
    def page_events(self) -> PageEvents | None:
        """What the prefix cache holds, where that is told."""
        return self._engine.page_events

    @property
    def page_source(self) -> PageSource | None:
        """What gives pages to other engines, where this one does."""
        return self._engine.page_source

    @property
    def refusal(self) -> str | None:
        """Why it takes no requests now although it lives, or None."""
        return self._engine.lifecycle.refusal

    def _open(self, request: EngineRequest, stream: OutputStream) -> None:
        """Admission: what is refused here is refused at once, whatever the engine is doing."""
        config = self._engine.config
        with self._lock:
            check_door(
                failed=self._engine.failure is not None,
                draining=self.draining,
                request_id=request.request_id,
                in_use=request.request_id in self._streams,
            )
            if self.refusal is not None:
                raise RequestError(ErrorKind.UNAVAILABLE, self.refusal, retry_after_s=5.0)
            tokens = len(request.prompt_token_ids)
            check_queue(
                config,
                waiting=self._engine.loop.stats.num_waiting + self._engine.loop.inbox.qsize(),
                waiting_tokens=sum(self._queued_tokens.values()) if config.max_num_queued_tokens is not None else 0,
                tokens=tokens,
            )
            self._streams[request.request_id] = stream
            self._queued_tokens[request.request_id] = tokens
        self._engine.loop.inbox.put(Submit(request))

    def _close(self, request_id: str) -> None:
        with self._lock:
            self._streams.pop(request_id, None)
            self._queued_tokens.pop(request_id, None)

    # ---- called on the engine thread ----

    def deliver(self, outputs: list[EngineOutput]) -> None:
        """One wake-up a step and event loop, however many requests it has."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[OutputStream, EngineOutput]]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                self._queued_tokens.pop(output.request_id, None)
                by_loop.setdefault(stream.loop, []).append((stream, output))
        for loop, items in by_loop.items():
            _on_loop(loop, _put_all, items)

    def fail(self, request_id: str, error: RequestError) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            _on_loop(stream.loop, stream.fail, error)

    def fail_all(self, error: RequestError) -> None:
        with self._lock:
            streams = list(self._streams.values())
        for stream in streams:
            _on_loop(stream.loop, stream.fail, error)


def _put_all(items: list[tuple[OutputStream, EngineOutput]]) -> None:
    for stream, output in items:
        stream.put(output)


def _on_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:  # the loop is closed: nobody listens any more
        log.debug("an event loop closed with requests still running")
