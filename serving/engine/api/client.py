"""The engine as front ends see it. Implementations: in process (engine.py), and over our gRPC
(serving/frontends/grpc/client.py); tests/mock_engine.py is a third that needs no model."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import numpy as np

from serving.engine.api.adapters import AdapterClient
from serving.engine.api.lifecycle import Lifecycle
from serving.engine.api.page_events import PageEvents
from serving.engine.api.peers.transfers import PageSource
from serving.engine.api.types import EngineInfo, EngineOutput, EngineRequest, EngineStats, TokenPair


class EngineClient(Protocol):
    """Asynchronous face of an engine. Safe to call from any one event loop."""

    def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """Runs one request; yields what is new until an output with a finish reason.

        Closing the iterator early (or cancelling the task that reads it) aborts the request: it leaves the batch
        within two steps and its pages are freed.

        Raises:
            RequestError: RESOURCE_EXHAUSTED (queue full), UNAVAILABLE (draining, or the engine died), INTERNAL.
        """
        ...

    async def abort(self, request_id: str) -> bool:
        """Ends a request with FinishReason.ABORT. False if it is not live."""
        ...

    def info(self) -> EngineInfo:
        """Facts fixed at start."""
        ...

    def stats(self) -> EngineStats:
        """A recent snapshot."""
        ...

    @property
    def healthy(self) -> bool:
        """False once the engine can serve no more."""
        ...

    # What only some engines do. None where this one does not; an implementation that inherits from here says what it has.

    @property
    def lifecycle(self) -> Lifecycle | None:
        """Pausing, sleeping and new weights, where the engine runs in this process."""
        return None

    @property
    def embedder(self) -> EmbeddingClient | None:
        """What makes vectors; whether the served model is meant for it says `EngineInfo.tasks`."""
        return None

    @property
    def scorer(self) -> ScoringClient | None:
        """What scores pairs of texts."""
        return None

    @property
    def classifier(self) -> ClassifyingClient | None:
        """What tells labels of texts."""
        return None

    @property
    def adapters(self) -> AdapterClient | None:
        """What loads and lists LoRA adapters."""
        return None

    @property
    def page_events(self) -> PageEvents | None:
        """Tells what the prefix cache holds; None where nobody asked for that at the start."""
        return None

    @property
    def page_source(self) -> PageSource | None:
        """Gives pages to other engines; None where nobody asked for that at the start."""
        return None

    @property
    def residence(self) -> Residence | None:
        """Where its model is among several of one server; None where it is the only one."""
        return None

    @property
    def refusal(self) -> str | None:
        """Why it takes no requests now although it lives, or None."""
        return None


class EmbeddingClient(Protocol):
    """A client of an engine whose `EngineInfo.tasks` has "embed"."""

    async def embed(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        pooling: str | None = None,
        priority: int = 0,
        adapter: str | None = None,
    ) -> np.ndarray:
        """One text's vector: float32 [embed] of length 1. Concurrent calls share batches.

        Args:
            request_id: unique among live requests.
            token_ids: 1 to max_model_len ids, each in [0, vocab), special tokens included.
            pooling: "mean", "last", or (encoders) "cls"; None is the model's own, `EngineInfo.pooling`.
            priority: lower runs first.
            adapter: digest of the adapter to run with, where the engine has `adapters`.
        Raises:
            RequestError: INVALID_ARGUMENT (a pooling that the model does not do), RESOURCE_EXHAUSTED (queue full),
                UNAVAILABLE (draining), INTERNAL.
        """
        ...


class ScoringClient(Protocol):
    """A client of an engine whose `EngineInfo.tasks` has "score": a cross-encoder that reads two texts as one."""

    async def score(self, request_id: str, pairs: Sequence[TokenPair], *, priority: int = 0) -> np.ndarray:
        """How relevant each pair's second text is to its first: float32 [pairs], in the model's own scale (0 to 1 where
        its last step is a sigmoid, as for most rerankers). Pairs share batches with those of concurrent calls.

        Args:
            request_id: unique among live requests.
            pairs: at least one, each of 1 to max_model_len tokens; `Tokenizer.encode_pair` makes them.
            priority: lower runs first.
        Raises:
            RequestError: as `EmbeddingClient.embed`.
        """
        ...


class ClassifyingClient(Protocol):
    """A client of an engine whose `EngineInfo.tasks` has "classify": a sequence classifier, rerankers among them."""

    async def classify(
        self, request_id: str, token_ids: Sequence[int], *, raw: bool = False, priority: int = 0
    ) -> np.ndarray:
        """What one text is: float32 [labels], in the order of `EngineInfo.labels`. Concurrent calls share batches.

        Args:
            request_id: unique among live requests.
            token_ids: 1 to max_model_len ids, special tokens included.
            raw: the logits, instead of probabilities as the model's authors mean them (`models.label_head`).
            priority: lower runs first.
        Raises:
            RequestError: as `EmbeddingClient.embed`.
        """
        ...


class Where(enum.Enum):
    """The states of a model on a server that has several and not the memory for all of them; the values are what clients read."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    SLEEPING = "sleeping"
    WAKING = "waking"
    FAILED = "failed"


class Residence(Protocol):
    """One model's place among the several of its server. Belongs to the server's event loop."""

    @property
    def where(self) -> Where:
        """FAILED: it could not be loaded, or its engine died; the next request tries again."""
        ...

    @property
    def progress(self) -> str | None:
        """What a request for it waits for now, in a few words; None where it waits for nothing."""
        ...

    @property
    def error(self) -> str | None:
        """Why it failed, in a sentence."""
        ...

    @property
    def pinned(self) -> bool:
        """It never gives way to another one."""
        ...

    @property
    def aliases(self) -> tuple[str, ...]:
        """Further names that it answers to."""
        ...

    @property
    def device_bytes(self) -> int:
        """What it takes of the memory for models now."""
        ...

    @property
    def idle_until_s(self) -> float | None:
        """Seconds after which it goes to sleep unless somebody asks for it; None where it stays for as long as there is room."""
        ...

    async def load(self) -> None:
        """Returns once it takes requests.

        Raises:
            RequestError: RESOURCE_EXHAUSTED (it does not fit), UNAVAILABLE (the wait is over, or it could not be loaded).
        """
        ...

    async def sleep(self) -> None:
        """Gives its memory back, and can be woken soon. What runs waits, and is computed anew. Nothing where it has none."""
        ...

    async def unload(self) -> None:
        """Gives all back: engine, programs, weights.

        Raises:
            RequestError: FAILED_PRECONDITION: requests run with it.
        """
        ...

    def pin(self, pinned: bool) -> None:
        """Whether it may give way from now on."""
        ...

    def keep(self, seconds: float | None) -> None:
        """Has it sleep after so many seconds without requests from now on; None: not for idling."""
        ...
