"""The engine as front ends see it. Implementations: in process (engine.py), and over our gRPC
(serving/frontends/grpc/client.py); tests/mock_engine.py is a third that needs no model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import numpy as np

from serving.engine.api.adapters import AdapterClient
from serving.engine.api.lifecycle import Lifecycle
from serving.engine.api.page_events import PageEvents
from serving.engine.api.peers.transfers import PageSource
from serving.engine.api.residence import Residence
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
