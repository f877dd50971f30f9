"""An engine client that measures what passes through it, whatever entry the request came by."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import Any, cast

import numpy as np

from serving.engine.api.adapters import AdapterClient
from serving.engine.api.client import ClassifyingClient, EmbeddingClient, EngineClient, Residence, ScoringClient
from serving.engine.api.lifecycle import Lifecycle
from serving.engine.api.page_events import PageEvents
from serving.engine.api.peers.transfers import PageSource
from serving.engine.api.types import EngineInfo, EngineOutput, EngineRequest, EngineStats, FinishReason, TokenPair
from serving.errors import RequestError
from serving.metrics.metrics import Metrics
from serving.metrics.tracing import Tracing


class MeteredClient(EngineClient):
    """Passes everything to `client` and observes latencies, token counts and reasons.

    Args:
        model_name: the metrics' `model_name` label; None takes the engine's model id.
        tracing: where a span of each completion goes; None makes none.
    """

    def __init__(self, client: EngineClient, model_name: str | None = None, tracing: Tracing | None = None) -> None:
        self._client = client
        self._model_name = model_name or client.info().model_id
        self._tracing = tracing
        self.metrics = Metrics(client, model_name)
        h = self.metrics.histograms
        self._ttft = h["time_to_first_token_seconds"].observe
        self._gap = h["inter_token_latency_seconds"].observe

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """As EngineClient.generate."""
        start = request.arrival_time or time.monotonic()
        last, ttft, tokens, cached, final = 0.0, 0.0, 0, 0, None
        stream = cast(AsyncGenerator[EngineOutput, None], self._client.generate(request))  # can be closed: its contract
        entered = True
        try:
            async with contextlib.aclosing(stream):
                async for output in stream:
                    if output.token_ids:
                        now = time.monotonic()
                        if tokens:
                            if not request.whole:  # nobody has seen a gap
                                self._gap(now - last)
                        else:
                            ttft = now - start
                            self._ttft(ttft)
                        last = now
                        tokens += len(output.token_ids)
                    cached = max(cached, output.num_cached_tokens)
                    if output.finish_reason is not None:
                        final = output
                    yield output
        except RequestError as error:
            entered = tokens > 0
            self.metrics.count("admission_rejections", error.kind.name.lower())
            raise
        finally:
            if entered:
                self._finished(request, final, tokens, cached, time.monotonic() - start)
                if self._tracing is not None:
                    self._tracing.record(self._model_name, request, final, tokens, ttft, start)

    def _finished(
        self, request: EngineRequest, final: EngineOutput | None, tokens: int, cached: int, seconds: float
    ) -> None:
        """Observes a request that was served, to its end or to its abort."""
        reason = final.finish_reason if final is not None and final.finish_reason else FinishReason.ABORT
        metrics, h = self.metrics, self.metrics.histograms
        metrics.count("request_success", reason.value)
        metrics.count("prompt_tokens_cached", by=cached)
        h["request_prompt_tokens"].observe(len(request.prompt_token_ids))
        h["request_generation_tokens"].observe(tokens)
        if final is not None:
            h["request_num_preemptions"].observe(final.num_preemptions)
        h["request_prefill_kv_computed_tokens"].observe(len(request.prompt_token_ids) - cached)
        if request.params.max_tokens is not None:
            h["request_params_max_tokens"].observe(request.params.max_tokens)
        h["e2e_request_latency_seconds"].observe(seconds)
        if final is None or not final.times.finished:
            return
        # Differences of one clock, the engine's, which may be another machine's than ours.
        t = final.times
        if t.scheduled:
            h["request_queue_time_seconds"].observe(max(0.0, t.scheduled - t.arrival))
            h["request_inference_time_seconds"].observe(max(0.0, t.finished - t.scheduled))
        if t.scheduled and t.first_token:
            h["request_prefill_time_seconds"].observe(max(0.0, t.first_token - t.scheduled))
            h["request_decode_time_seconds"].observe(max(0.0, t.finished - t.first_token))
        if t.first_token and tokens > 1:
            per_token = max(0.0, t.finished - t.first_token) / (tokens - 1)
            h["request_time_per_output_token_seconds"].observe(per_token)

    async def embed(self, request_id: str, token_ids: Sequence[int], **options: Any) -> np.ndarray:
        assert self._client.embedder is not None
        return await self._read(self._client.embedder.embed(request_id, token_ids, **options), (len(token_ids),))

    async def score(self, request_id: str, pairs: Sequence[TokenPair], **options: Any) -> np.ndarray:
        assert self._client.scorer is not None
        lengths = [len(pair.token_ids) for pair in pairs]
        return await self._read(self._client.scorer.score(request_id, pairs, **options), lengths)

    async def classify(self, request_id: str, token_ids: Sequence[int], **options: Any) -> np.ndarray:
        assert self._client.classifier is not None
        return await self._read(self._client.classifier.classify(request_id, token_ids, **options), (len(token_ids),))

    async def _read(self, work: Awaitable[np.ndarray], lengths: Sequence[int]) -> np.ndarray:
        """Observes sequences that are only read: each counts as one request that made no token."""
        start = time.monotonic()
        metrics, h = self.metrics, self.metrics.histograms
        reason = FinishReason.ABORT  # which a cancellation is
        entered = True
        try:
            result = await work
            reason = FinishReason.STOP
            return result
        except RequestError as error:
            entered = False
            metrics.count("admission_rejections", error.kind.name.lower())
            raise
        finally:
            if entered:
                metrics.count("request_success", reason.value, by=len(lengths))
                for length in lengths:
                    h["request_prompt_tokens"].observe(length)
                    h["e2e_request_latency_seconds"].observe(time.monotonic() - start)

    def count_request(self, n: int) -> None:
        """A request for `n` completions begins. The service says so: the engine sees the completions one by one."""
        self.metrics.histograms["request_params_n"].observe(n)

    async def abort(self, request_id: str) -> bool:
        return await self._client.abort(request_id)

    def info(self) -> EngineInfo:
        return self._client.info()

    def stats(self) -> EngineStats:
        return self._client.stats()

    @property
    def healthy(self) -> bool:
        return self._client.healthy

    @property
    def adapters(self) -> AdapterClient | None:
        return self._client.adapters

    @property
    def page_events(self) -> PageEvents | None:
        return self._client.page_events

    @property
    def page_source(self) -> PageSource | None:
        return self._client.page_source

    @property
    def lifecycle(self) -> Lifecycle | None:
        return self._client.lifecycle

    @property
    def embedder(self) -> EmbeddingClient | None:
        """Itself, where the engine embeds: that is measured too."""
        return self if self._client.embedder is not None else None

    @property
    def scorer(self) -> ScoringClient | None:
        """Itself, where the engine scores."""
        return self if self._client.scorer is not None else None

    @property
    def classifier(self) -> ClassifyingClient | None:
        """Itself, where the engine classifies."""
        return self if self._client.classifier is not None else None

    @property
    def residence(self) -> Residence | None:
        return self._client.residence

    @property
    def refusal(self) -> str | None:
        return self._client.refusal
