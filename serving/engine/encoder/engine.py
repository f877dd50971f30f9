"""An engine for encoders: texts in, vectors or scores out. Concurrent requests share batches.

A batch that fails is tried again in halves, as a step is that generates (serving.engine.scheduling.recovery): whose text fails
alone, twice, is told so, and all others only lost time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Any

import numpy as np

from models.embedding_head import EmbeddingHead
from models.label_head import LabelHead
from serving.engine.api.admission import check_door, check_queue
from serving.engine.api.client import ClassifyingClient, EmbeddingClient, EngineClient, ScoringClient
from serving.engine.api.config import EngineConfig
from serving.engine.api.lifecycle import Lifecycle, LoadModel
from serving.engine.api.mortal import Mortal
from serving.engine.api.types import EngineInfo, EngineOutput, EngineRequest, EngineStats, TokenPair
from serving.engine.device.programs.compiling import starting
from serving.engine.encoder.queue import EncoderQueue, Job
from serving.engine.encoder.runner import EncoderRunner, Text
from serving.engine.scheduling.recovery import Suspects
from serving.errors import ErrorKind, RequestError, invalid

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class NewWeights:
    """Another checkpoint for the programs of this one, read and checked.

    Attributes:
        leaves: its arrays.
        head: how it makes vectors.
        labels: what it tells apart.
    """

    leaves: tuple[Any, ...]
    head: EmbeddingHead
    labels: LabelHead


class _Pending:
    """A request that waits or runs. `results` is the engine thread's until `future` is done."""

    def __init__(self, request_id: str, texts: int) -> None:
        self.request_id = request_id
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[np.ndarray] = self.loop.create_future()
        self.results: list[np.ndarray | None] = [None] * texts
        self.left = texts

    def resolve(self, error: RequestError | None) -> None:
        """On the request's event loop: gives the results out, or the error."""
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(np.stack([result for result in self.results if result is not None]))

    def resolve_soon(self, error: RequestError) -> None:
        """From any thread: gives the error out."""
        _on_loop(self.loop, [(self, error)])


class EncoderEngine(Mortal):
    """A running encoder. `start` starts its thread; the attributes are those of `Engine`.

    Attributes:
        client: the in-process client; an EmbeddingClient, or a ClassifyingClient and perhaps a ScoringClient, as `info().tasks`
            says.
        source: where the model came from.
        generation_config: empty.
        failure: what killed the engine, or None.
        runner: owns weights and programs.
        lifecycle: pausing, sleeping, new weights.
        busy_since: time.monotonic() seconds at which the batch that runs began, or None. What a watchdog looks at.
    """

    def __init__(
        self,
        config: EngineConfig,
        loaded: Any,
        runner: EncoderRunner,
        info: EngineInfo,
        load_model: LoadModel | None = None,
        labels: LabelHead | None = None,
    ) -> None:
        super().__init__()
        self.lifecycle = Lifecycle(self, load_model)
        self.config = config
        self.source = loaded.source
        self.generation_config: dict[str, Any] = {}
        self.runner = runner
        self.queue = EncoderQueue(runner.buckets)
        self.stats = EngineStats()
        self.wake = threading.Condition()
        self.busy_since: float | None = None
        self._stopping = False
        self._held = False
        self._rehearsed = threading.Event()
        self._running: list[Job] = []
        self._suspects = Suspects()
        self.client = EncoderClient(self, info, labels or LabelHead())
        self._thread = threading.Thread(target=self._run, daemon=True, name="jaxserve-encoder")

    def start(self) -> None:
        """Starts the thread that runs batches, and waits until it has run one: a thread's own first call is dear, and is not to
        be the first client's. Raises what that one raised."""
        self._thread.start()
        self._rehearsed.wait()
        if self.failure is not None:
            raise self.failure

    def shutdown(self, timeout: float = 30.0) -> None:
        """Stops the thread and ends what still runs with UNAVAILABLE."""
        self.client.draining = True
        with self.wake:
            self._stopping = True
            self.wake.notify_all()
        self._thread.join(timeout)
        self.client.fail_all(RequestError(ErrorKind.UNAVAILABLE, "the server has stopped."))
        self.runner.guard.close()

    def wrap_runner(self, wrap: Callable[[Any], Any]) -> None:
        """Puts something around what carries batches out (faults on purpose)."""
        self.runner = wrap(self.runner)

    @property
    def recent(self) -> Iterable[Any]:
        """Nothing: of batches no record is kept."""
        return ()

    def snapshot(self) -> EngineStats:
        """The counters now."""
        waiting = len(self.queue)
        return dataclasses.replace(self.stats, num_waiting=waiting, num_running=len(self._running))

    def _run(self) -> None:
        try:
            self.runner.run([Text((0,))])
            self._rehearsed.set()
            while self._step():
                pass
        except BaseException as error:  # nothing may end this thread silently
            self.declare_dead(error)
        finally:
            self._rehearsed.set()

    def _step(self) -> bool:
        """Waits for texts and runs one batch. False once the engine is to stop."""
        with self.wake:
            self.wake.wait_for(lambda: self._stopping or (len(self.queue) and not self._held))
            if self._stopping:
                return False
            self._running = batch = self._next_batch()
        self.busy_since = began = time.monotonic()
        try:
            results = self.runner.run([job.text for job in batch])
        except Exception as error:
            self._recover(batch, error)
            return True
        finally:
            self.busy_since = None
        seconds = time.monotonic() - began
        self._suspects.passed([str(job.turn) for job in batch])
        tokens = sum(len(job.text.token_ids) for job in batch)
        self.stats = dataclasses.replace(
            self.stats,
            prompt_tokens=self.stats.prompt_tokens + tokens,
            num_steps=self.stats.num_steps + 1,
            num_recompilations=self.runner.guard.count,
            last_step_s=seconds,
        )
        self._done()
        self.client.deliver(batch, results)
        return True

    def _next_batch(self) -> list[Job]:
        """Texts of the suspects alone while there are some. The lock is held and something waits."""
        turns = self.queue.turns
        self._suspects.gone(lambda turn: int(turn) in turns)
        only = self._suspects.only
        return self.queue.take(None if only is None else {int(turn) for turn in only})

    def _recover(self, batch: list[Job], error: Exception) -> None:
        """Goes on after a batch that failed. Raises the error when that makes no sense."""
        log.error("a batch of %d texts failed; trying again", len(batch), exc_info=error)
        culprit = self._suspects.failed([str(job.turn) for job in batch])
        self.stats = dataclasses.replace(self.stats, num_failed_steps=self._suspects.failures)
        if self._suspects.hopeless:
            raise error
        guilty = [job for job in batch if str(job.turn) == culprit]
        with self.wake:
            again = [job for job in batch if job not in guilty and self.client.waits_for(job)]
            self.queue.put_back(again)
        self._done()
        for job in guilty:
            job.request.resolve_soon(RequestError(ErrorKind.INTERNAL, "the model failed on this request."))

    def _done(self) -> None:
        """No batch runs."""
        with self.wake:
            self._running = []
            self.wake.notify_all()

    # -- serving.engine.api.lifecycle.Restable -----------------------------------------------------------------------

    @property
    def alone(self) -> bool:
        """An encoder is always one process."""
        return True

    def hold(self) -> None:
        """Takes no further batches; returns when none runs."""
        with self.wake:
            self._held = True
            self.wake.wait_for(lambda: not self._running or self.failure is not None)

    def go_on(self) -> None:
        """Takes batches again."""
        with self.wake:
            self._held = False
            self.wake.notify_all()

    def give_back(self, keep_weights: bool) -> int:
        """Gives the memory of the weights back. While held."""
        return self.runner.sleep(keep_weights)

    def take_back(self, new: NewWeights | None) -> None:
        """Takes it again."""
        self.runner.wake(None if new is None else new.leaves)

    def read(self, load: Callable[[], Any]) -> NewWeights:
        """The weights of another checkpoint, checked to fit, with its labels and what makes vectors."""
        with starting():  # reading may compile conversions, which is no defect
            loaded = load()
            leaves = self.runner.leaves_of(loaded.model)
        self.runner.check_head(loaded.embedding)
        labels = LabelHead.of(loaded.config) if self.client.classifier is not None else LabelHead()
        return NewWeights(leaves, loaded.embedding, labels)

    def replace(self, new: NewWeights) -> None:
        """Uses other weights from the next batch on; what ran before is told by the old labels."""
        held = self._held
        self.hold()
        self.runner.replace_weights(new.leaves, new.head)
        self.client.use(new)
        if not held:
            self.go_on()

    def forget(self) -> None:
        """Nothing: an encoder keeps nothing between batches."""


class EncoderClient(EngineClient):
    """EngineClient, EmbeddingClient, ClassifyingClient and ScoringClient over an encoder in this process; its `info().tasks`
    says which of the last three it is."""

    def __init__(self, engine: EncoderEngine, info: EngineInfo, labels: LabelHead) -> None:
        self._engine = engine
        self._labels = labels
        self._info = info
        self._live: dict[str, _Pending] = {}
        self.draining = False

    async def embed(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        pooling: str | None = None,
        priority: int = 0,
        adapter: str | None = None,
    ) -> np.ndarray:
        """See EmbeddingClient.embed."""
        self._check_task("embed", "tells labels of texts or scores pairs of them, and gives no embeddings")
        poolings = self._engine.runner.poolings
        if pooling is not None and pooling not in poolings:
            raise invalid(f"pooling must be one of {', '.join(poolings)}; got {pooling!r}.", "pooling")
        return (await self._submit(request_id, [Text(token_ids, pooling=pooling)], priority))[0]

    async def score(self, request_id: str, pairs: Sequence[TokenPair], *, priority: int = 0) -> np.ndarray:
        """See ScoringClient.score."""
        self._check_task("score", "gives no scores for pairs of texts")
        texts = [Text(pair.token_ids, pair.segment_ids) for pair in pairs]
        return self._labels.finish(await self._submit(request_id, texts, priority))[:, 0]

    async def classify(
        self, request_id: str, token_ids: Sequence[int], *, raw: bool = False, priority: int = 0
    ) -> np.ndarray:
        """See ClassifyingClient.classify."""
        self._check_task("classify", "tells no labels of texts")
        logit_L = (await self._submit(request_id, [Text(token_ids)], priority))[0]
        return logit_L if raw else self._labels.finish(logit_L)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Refuses: an encoder completes nothing."""
        raise self._wrong_task("does not generate text")
        yield  # what makes it a generator, as EngineClient.generate is

    async def abort(self, request_id: str) -> bool:
        """See EngineClient.abort; the request fails with UNAVAILABLE."""
        pending = self._live.get(request_id)
        if pending is None:
            return False
        pending.resolve(RequestError(ErrorKind.UNAVAILABLE, "the request was aborted."))
        return True

    def info(self) -> EngineInfo:
        return self._info

    def use(self, new: NewWeights) -> None:
        """Tells labels and makes vectors by what another checkpoint says."""
        self._labels = new.labels
        names = new.labels.labels if self.classifier is not None else ()
        self._info = dataclasses.replace(self._info, labels=names, **new.head.facts())

    def waits_for(self, job: Job) -> bool:
        """Whether anybody still wants a job's result."""
        return self._live.get(job.request.request_id) is job.request

    def stats(self) -> EngineStats:
        return self._engine.snapshot()

    @property
    def healthy(self) -> bool:
        return self._engine.failure is None

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def lifecycle(self) -> Lifecycle:
        """Pausing, sleeping, new weights."""
        return self._engine.lifecycle

    @property
    def embedder(self) -> EmbeddingClient | None:
        return self if "embed" in self._info.tasks else None

    @property
    def scorer(self) -> ScoringClient | None:
        return self if "score" in self._info.tasks else None

    @property
    def classifier(self) -> ClassifyingClient | None:
        return self if "classify" in self._info.tasks else None

    @property
    def refusal(self) -> str | None:
        return self._engine.lifecycle.refusal

    async def _submit(self, request_id: str, texts: list[Text], priority: int) -> np.ndarray:
        engine = self._engine
        for text in texts:
            if not 0 < len(text.token_ids) <= self._info.max_model_len:
                raise invalid(
                    f"The text has {len(text.token_ids)} tokens; this model reads 1 to {self._info.max_model_len}.",
                    "input",
                )
        with engine.wake:
            check_door(
                failed=engine.failure is not None,
                draining=self.draining,
                request_id=request_id,
                in_use=request_id in self._live,
            )
            if self.refusal is not None:
                raise RequestError(ErrorKind.UNAVAILABLE, self.refusal, retry_after_s=5.0)
            check_queue(
                engine.config,
                waiting=len(engine.queue),
                waiting_tokens=engine.queue.num_tokens,
                tokens=sum(len(text.token_ids) for text in texts),
            )
            pending = self._live[request_id] = _Pending(request_id, len(texts))
            for index, text in enumerate(texts):
                engine.queue.add(text, pending, index, priority)
            engine.wake.notify_all()
        try:
            return await pending.future
        finally:
            with engine.wake:
                self._live.pop(request_id, None)
                if pending.left:
                    engine.queue.remove(pending)

    def _check_task(self, task: str, otherwise: str) -> None:
        if task not in self._info.tasks:
            raise self._wrong_task(otherwise)

    def _wrong_task(self, what: str) -> RequestError:
        return invalid(f"The model {self._info.model_id!r} {what}.", "model")

    # ---- called on the engine thread ----

    def deliver(self, batch: list[Job], results: np.ndarray) -> None:
        """Hands results out; wakes each event loop once."""
        done: dict[asyncio.AbstractEventLoop, list[tuple[_Pending, RequestError | None]]] = {}
        for job, result in zip(batch, results, strict=True):
            pending: _Pending = job.request
            pending.results[job.index] = result
            pending.left -= 1
            if not np.isfinite(result).all():
                error = RequestError(ErrorKind.INTERNAL, "the model's result is not a finite number.")
                done.setdefault(pending.loop, []).append((pending, error))
            elif not pending.left:
                done.setdefault(pending.loop, []).append((pending, None))
        for loop, items in done.items():
            _on_loop(loop, items)

    def fail_all(self, error: RequestError) -> None:
        with self._engine.wake:
            pending = list(self._live.values())
        for one in pending:
            one.resolve_soon(error)


def _on_loop(loop: asyncio.AbstractEventLoop, items: list[tuple[_Pending, RequestError | None]]) -> None:
    def resolve_all() -> None:
        for pending, error in items:
            pending.resolve(error)

    try:
        loop.call_soon_threadsafe(resolve_all)
    except RuntimeError:  # the loop is closed: nobody listens any more
        log.debug("an event loop closed with requests still running")
