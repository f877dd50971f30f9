"""OpenTelemetry traces, one span a completion, by the GenAI conventions. Needs the extra `otel`.

https://opentelemetry.io/docs/specs/semconv/gen-ai/ ; the `gen_ai.latency.*` attributes are vLLM's.
"""

from __future__ import annotations

import contextvars
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from serving.engine.api.types import EngineOutput, EngineRequest, FinishReason
from serving.installation import extra

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

trace_headers_of_task: contextvars.ContextVar[Mapping[str, str] | None] = contextvars.ContextVar(
    "jaxserve_trace_headers", default=None
)
"""`traceparent` and `tracestate` (W3C) of the request that the running task serves; front ends set it."""
TRACE_HEADERS = frozenset({"traceparent", "tracestate"})


class Tracing:
    """Makes spans of what was served. The sampler of `provider` decides which are kept."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("jaxserve")

    @classmethod
    def to_collector(cls, endpoint: str) -> Tracing:
        """Spans sent in batches to an OTLP collector over gRPC, such as "http://localhost:4317".

        Raises:
            ValueError: the extra is not installed; the sentence says how.
        """
        try:
            # The exporter comes with the extra alone, which the type checker's environment need not have.
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # pyright: ignore[reportMissingImports]
                OTLPSpanExporter,
            )
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise ValueError(f"Traces need OpenTelemetry: {extra('otel')}.") from None
        provider = TracerProvider(resource=Resource.create({"service.name": "jaxserve"}))
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def record(
        self, model: str, request: EngineRequest, final: EngineOutput | None, tokens: int, ttft_s: float, start: float
    ) -> None:
        """One finished or aborted completion.

        Args:
            ttft_s: seconds to the first token; 0.0 when there was none.
            start: time.monotonic() at which the request arrived.
        """
        from opentelemetry import propagate, trace

        now_ns, seconds = time.time_ns(), time.monotonic() - start
        begin_ns = now_ns - round(seconds * 1e9)
        span = self._tracer.start_span(
            f"text_completion {model}",
            context=propagate.extract(dict(trace_headers_of_task.get() or {})),
            kind=trace.SpanKind.SERVER,
            start_time=begin_ns,
            attributes={k: v for k, v in _attributes(model, request, final, tokens, seconds).items() if v is not None},
        )
        if ttft_s:
            span.set_attribute("gen_ai.latency.time_to_first_token", ttft_s)
            span.add_event("first token", timestamp=begin_ns + round(ttft_s * 1e9))
        if final is not None and final.finish_reason in (FinishReason.REFUSED, FinishReason.ERROR):
            span.set_status(trace.StatusCode.ERROR, final.error)
        span.end(now_ns)

    def shutdown(self) -> None:
        """Sends what is waiting."""
        self._provider.shutdown()


def _attributes(
    model: str, request: EngineRequest, final: EngineOutput | None, tokens: int, seconds: float
) -> dict[str, Any]:
    params = request.params
    reason = final.finish_reason.value if final is not None and final.finish_reason else FinishReason.ABORT.value
    found = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "jaxserve",
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k or None,
        "gen_ai.request.seed": params.seed,
        "gen_ai.response.id": request.request_id,
        "gen_ai.response.finish_reasons": (reason,),
        "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
        "gen_ai.usage.output_tokens": tokens,
        "gen_ai.latency.e2e": seconds,
    }
    t = final.times if final is not None else None
    if t is not None and t.scheduled:
        found["gen_ai.latency.time_in_queue"] = t.scheduled - t.arrival
        if t.first_token:
            found["gen_ai.latency.time_in_model_prefill"] = t.first_token - t.scheduled
        if t.first_token and t.finished:
            found["gen_ai.latency.time_in_model_decode"] = t.finished - t.first_token
    return found
