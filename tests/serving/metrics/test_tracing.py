"""Spans of what is served: attributes, times, the caller's trace."""

from __future__ import annotations

import httpx
import pytest

from serving.frontends.app import serve_http
from serving.metrics import MeteredClient
from serving.metrics.tracing import Tracing
from tests.mock_engine import MockEngine, mock_service

pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry's SDK is not installed")
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def spans() -> tuple[Tracing, InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider), exporter


async def test_a_completion_is_a_span_of_the_callers_trace(spans):
    tracing, exporter = spans
    service = mock_service(MeteredClient(MockEngine(reply="abc", step_s=0.001), "m", tracing))  # type: ignore[arg-type]
    server = await serve_http(service, port=0)
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        await http.post(
            "/v1/completions",
            json={"prompt": "my secret", "max_tokens": 3, "seed": 5, "request_id": "r1"},
            headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
        )
        await http.post("/v1/completions", json={"prompt": "x", "n": 2})
    await server.stop()
    first, *others = exporter.get_finished_spans()
    got = dict(first.attributes)
    assert first.name == "text_completion m" and len(others) == 2
    assert format(first.context.trace_id, "032x") == TRACE and format(first.parent.span_id, "016x") == PARENT
    assert all(span.parent is None for span in others)
    assert got["gen_ai.usage.input_tokens"] == 10 and got["gen_ai.usage.output_tokens"] == 3
    assert got["gen_ai.response.finish_reasons"] == ("length",) and got["gen_ai.request.seed"] == 5
    assert got["gen_ai.response.id"].startswith("r1#") and got["gen_ai.request.max_tokens"] == 3
    latency = {k.removeprefix("gen_ai.latency."): v for k, v in got.items() if "latency" in k}
    assert 0 < latency["time_to_first_token"] <= latency["e2e"]
    assert {"time_in_queue", "time_in_model_prefill", "time_in_model_decode"} <= set(latency)
    assert first.start_time <= first.events[0].timestamp <= first.end_time
    assert "secret" not in first.to_json()


async def test_aborts_and_failures_are_told(spans):
    tracing, exporter = spans
    engine = MockEngine(reply="abcdef")
    service = mock_service(MeteredClient(engine, tracing=tracing))  # type: ignore[arg-type]
    server = await serve_http(service, port=0)
    engine.fail_next = "NaN"
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 500
    await server.stop()
    (span,) = exporter.get_finished_spans()
    assert not span.status.is_ok and span.attributes["gen_ai.response.finish_reasons"] == ("error",)
