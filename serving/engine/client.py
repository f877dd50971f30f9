"""The engine as front ends see it. Implementations: in process (engine.py), and over our gRPC
(serving/frontends/grpc/client.py); tests/mock_engine.py is a third that needs no model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from serving.engine.types import EngineInfo, EngineOutput, EngineRequest, EngineStats


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
