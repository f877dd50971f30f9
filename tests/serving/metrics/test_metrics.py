"""Metrics: right numbers, names as documented, and a dashboard and alerts that ask for what is there."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.engine.api.adapters import AdapterLoad
from serving.engine.api.peers.stats import TransferStats
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import STEP_TOKEN_BOUNDS, EngineRequest, EngineStats, TokenPair
from serving.errors import RequestError
from serving.frontends.app import serve_http
from serving.metrics import MeteredClient, Metrics
from serving.metrics.catalog import BY_NAME, LABELS, PREFIX, SPECS, markdown_table
from serving.metrics.metrics import OPENMETRICS, Histogram
from serving.service import GenerateInput
from tests.mock_engine import ClassifyingEngine, EmbeddingEngine, MockEngine, ScoringEngine, mock_service

ROOT = pathlib.Path(__file__).parents[3]


def _samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(sample name without prefix, its labels beyond the common ones) -> value."""
    out = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k not in LABELS))
            out[sample.name.removeprefix(PREFIX), labels] = sample.value
    return out


def _request(name: str, **params) -> EngineRequest:
    return EngineRequest(name, (1, 2, 3), SamplingParams(**{"max_tokens": 5, **params}), eos_token_ids=(257,))


async def _run(client: MeteredClient, request: EngineRequest) -> None:
    async for _ in client.generate(request):
        pass


async def test_what_is_served_is_counted():
    client = MeteredClient(MockEngine(reply="abcdefgh", step_s=0.001), "m")
    for i in range(3):
        await _run(client, _request(f"r{i}"))
    got = _samples(client.metrics)
    assert got["prompt_tokens_total", ()] == 9 and got["generation_tokens_total", ()] == 15
    assert got["request_success_total", (("finished_reason", "length"),)] == 3
    assert got["time_to_first_token_seconds_count", ()] == 3
    assert got["inter_token_latency_seconds_count", ()] == 3 * 4
    assert got["request_generation_tokens_sum", ()] == 15 and got["request_prompt_tokens_sum", ()] == 9
    for name in ("queue", "prefill", "decode", "inference"):
        assert got[f"request_{name}_time_seconds_count", ()] == 3
    assert got["request_time_per_output_token_seconds_sum", ()] > 0
    assert got["request_params_max_tokens_sum", ()] == 15
    assert (
        got["e2e_request_latency_seconds_sum", ()]
        >= got["request_inference_time_seconds_sum", ()]
        >= got["request_decode_time_seconds_sum", ()]
    )


async def test_step_times_fill_and_start_up_are_told():
    stats = EngineStats(
        num_scheduled_tokens_total=30,
        num_bucket_tokens_total=40,
        host_time_s_total=1.5,
        device_wait_time_s_total=4.0,
    )
    engine = MockEngine()
    engine.stats = lambda: stats  # type: ignore[method-assign]
    metrics = Metrics(engine)
    metrics.set_startup({"load": 1.0, "total": 3.0})
    got = _samples(metrics)
    assert (got["scheduled_tokens_total", ()], got["bucket_tokens_total", ()], got["bucket_fill_ratio", ()]) == (
        30,
        40,
        0.75,
    )
    assert (got["step_host_seconds_total", ()], got["step_device_wait_seconds_total", ()]) == (1.5, 4.0)
    assert got["startup_seconds", (("phase", "load"),)] == 1.0
    assert got["startup_seconds", (("phase", "total"),)] == 3.0


async def test_aborts_refusals_and_failures_have_their_reason():
    engine = MockEngine(reply="abcdefgh", max_live=1)
    client = MeteredClient(engine)
    stream = client.generate(_request("gone"))
    await anext(stream)
    with pytest.raises(RequestError):
        await _run(client, _request("refused"))
    await stream.aclose()
    engine.fail_next = "NaN"
    await _run(client, _request("failed"))
    got = _samples(client.metrics)
    assert got["request_success_total", (("finished_reason", "abort"),)] == 1
    assert got["request_success_total", (("finished_reason", "error"),)] == 1
    assert got["request_success_total", (("finished_reason", "stop"),)] == 0
    assert got["admission_rejections_total", (("reason", "resource_exhausted"),)] == 1
    assert engine.aborted == ["gone"]


async def test_what_is_only_read_is_counted():
    engine = EmbeddingEngine()
    client = MeteredClient(engine)
    await client.embed("r", (3, 4))
    engine.fail_next = "full"
    with pytest.raises(RequestError):
        await client.embed("r", (3, 4))
    got = _samples(client.metrics)
    assert got["request_success_total", (("finished_reason", "stop"),)] == 1
    assert got["request_prompt_tokens_sum", ()] == 2 and got["e2e_request_latency_seconds_count", ()] == 1
    assert got["admission_rejections_total", (("reason", "resource_exhausted"),)] == 1
    client = MeteredClient(ScoringEngine())
    await client.score("r", [TokenPair((1, 2, 3), (0, 0, 1)), TokenPair((1, 2), (0, 1))])
    got = _samples(client.metrics)
    assert got["request_success_total", (("finished_reason", "stop"),)] == 2
    assert got["request_prompt_tokens_sum", ()] == 5
    assert client.embedder is None and MeteredClient(MockEngine()).scorer is None
    client = MeteredClient(ClassifyingEngine())
    await client.classify("r", (1, 2, 3))
    got = _samples(client.metrics)
    assert got["request_success_total", (("finished_reason", "stop"),)] == 1
    assert got["request_prompt_tokens_sum", ()] == 3 and client.scorer is None


# What scrapers send: Prometheus 2.42 and 3.4 (https://prometheus.io/docs/instrumenting/content_negotiation/), a browser, curl.
SCRAPERS = {
    "prometheus2": "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "prometheus3": "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;"
    "version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
    "underscores": "text/plain;version=1.0.0;escaping=underscores,application/openmetrics-text;escaping=dots;q=0.1",
    "values": "application/openmetrics-text;version=1.0.0;escaping=values",
    "openmetrics2": "application/openmetrics-text;version=2.0.0",
    "browser": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
    "curl": "*/*",
    "nobody": "",
}


@pytest.mark.parametrize("scraper", SCRAPERS)
def test_every_scraper_reads_the_same_names(scraper: str):
    client = MeteredClient(MockEngine())
    body, media_type = client.metrics.render(SCRAPERS[scraper])
    is_openmetrics = OPENMETRICS in SCRAPERS[scraper]
    assert media_type.startswith(OPENMETRICS if is_openmetrics else "text/plain; version=0.0.4")
    text = body.decode()
    assert text.endswith("# EOF\n") is is_openmetrics
    for spec in SPECS:
        if spec.always:
            assert f"\n{spec.sample}{'_bucket' if spec.kind == 'histogram' else ''}{{" in text, spec.sample
    assert not re.search(r'jaxserve_|U__|"jaxserve', text)


async def test_what_the_service_and_the_engine_know_is_counted():
    engine = MockEngine(reply="abc")
    plain = engine.stats
    counts = (3, *(0 for _ in STEP_TOKEN_BOUNDS[1:]), 2)
    engine.stats = lambda: dataclasses.replace(  # type: ignore[method-assign]
        plain(), step_tokens=counts, num_scheduled_tokens_total=40_003, num_waiting=5, num_deferred=2
    )
    client = MeteredClient(engine)
    service = mock_service(client)
    params = SamplingParams(n=3, max_tokens=2)
    async for _ in service.generate(await service.prepare(GenerateInput(text="a"), params)):
        pass
    got = _samples(client.metrics)
    assert (got["request_params_n_count", ()], got["request_params_n_sum", ()]) == (1, 3)
    assert got["request_num_preemptions_count", ()] == 3 and got["request_num_preemptions_sum", ()] == 0
    assert (got["iteration_tokens_total_count", ()], got["iteration_tokens_total_sum", ()]) == (5, 40_003)
    assert got["iteration_tokens_total_bucket", (("le", "1.0"),)] == 3
    waiting = {
        reason: got["num_requests_waiting_by_reason", (("reason", reason),)] for reason in ("capacity", "deferred")
    }
    assert waiting == {"capacity": 3, "deferred": 2} and got["num_requests_waiting", ()] == 5


def test_histograms_count_a_bound_into_its_bucket():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    assert histogram.cumulative() == [("1.0", 2), ("2.0", 4), ("+Inf", 5)] and histogram.sum == 14.0


async def _exported() -> tuple[dict[str, set[str]], str]:
    """Sample names of a server that has seen traffic, each with its label names; and the raw text."""
    engine = MockEngine(reply="abc", max_live=1)
    plain = engine.stats
    beside = {"expert_loads": np.array([[3, 1]]), "accepted_per_pos": (5, 2), "transfers": TransferStats(requests_in=7)}
    engine.stats = lambda: dataclasses.replace(plain(), **beside)  # type: ignore[method-assign]
    load = AdapterLoad(("one",), ("one", "two"), 4)
    engine.adapters = SimpleNamespace(load_now=lambda: load, find=lambda name: None)
    client = MeteredClient(engine)
    client.metrics.set_startup({"load": 1.0, "compile": 2.0})
    server = await serve_http(mock_service(client), port=0)
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        await http.post("/v1/completions", json={"prompt": "a"})
        await http.post("/v1/completions", json={"prompt": "a", "n": 3})  # more than the engine takes
        await http.get("/nowhere/1")
        reply = await http.get("/metrics")
        openmetrics = await http.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    await server.stop()
    assert reply.headers["content-type"].startswith("text/plain")
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n") and openmetrics.text.count(PREFIX) > 100
    names: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            names.setdefault(sample.name, set()).update(sample.labels)
    return names, reply.text


async def test_a_server_exports_what_the_catalog_says():
    names, text = await _exported()
    ours = {name for name in names if name.startswith(PREFIX)}
    for spec in SPECS:
        parts = (
            [spec.sample] if spec.kind != "histogram" else [f"{spec.sample}_{x}" for x in ("bucket", "sum", "count")]
        )
        for part in parts:
            assert part in ours, part
            assert {*LABELS, *spec.labels} <= names[part], part
            ours.discard(part)
        assert f"# HELP {spec.sample} {spec.text}" in text
    assert not ours, "exported but not in the catalog"
    assert 'max_lora="4",model_name="mock-1b"' in text and 'running_lora_adapters="one"' in text
    assert 'waiting_lora_adapters="one,two"' in text
    assert 'handler="unmatched"' in text and "/nowhere" not in text
    assert "process_resident_memory_bytes" in text
    assert re.search(r'kv_transfer_requests_total\{direction="in"[^}]*\} 7\.0', text)
    assert re.search(r'spec_decode_num_accepted_tokens_per_pos_total\{[^}]*position="1"\} 2\.0', text)


def test_the_docs_have_the_catalogs_table():
    assert markdown_table() in (ROOT / "docs/metrics.md").read_text()


def test_names_are_vllms_where_they_mean_the_same():
    """From vLLM's loggers; these are what its users' dashboards and Kubernetes gateways ask for."""
    known = {
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries",
        "spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens",
        "spec_decode_num_accepted_tokens_per_pos",
        "prefix_cache_hits", "num_preemptions", "prompt_tokens", "generation_tokens", "request_success",
        "request_prompt_tokens", "request_generation_tokens", "time_to_first_token_seconds",
        "inter_token_latency_seconds", "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
        "request_queue_time_seconds", "request_inference_time_seconds", "request_prefill_time_seconds",
        "request_decode_time_seconds", "request_params_max_tokens", "cache_config_info", "request_params_n",
        "request_num_preemptions", "iteration_tokens_total", "num_requests_waiting_by_reason",
    }  # fmt: skip
    assert known <= set(BY_NAME) and all(BY_NAME[name].vllm == name for name in known)
