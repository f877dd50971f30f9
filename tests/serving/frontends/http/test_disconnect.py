"""A browser tab that closes in the middle of a stream, over HTTP and a real engine of a tiny model."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from serving.frontends.app import serve_http
from serving.metrics import MeteredClient
from serving.service import TextService
from tests.mock_engine import MockTokenizer, until
from tests.tiny import tiny_engine

BODY = {"prompt": list(range(1, 40)), "max_tokens": 400, "ignore_eos": True, "stream": True, "temperature": 0}


@pytest.fixture(scope="module")
def engine():
    engine = tiny_engine(max_model_len=512, num_pages=200)
    yield engine
    engine.shutdown()


async def _metrics(http: httpx.AsyncClient) -> dict[str, float]:
    text = (await http.get("/metrics")).text
    return {name: float(value) for name, value in re.findall(r"^jaxserve:(\w+)\{[^}]*\} (\S+)$", text, flags=re.M)}


async def test_its_pages_are_free_two_steps_later(engine):
    tokenizer: Any = MockTokenizer()
    service = TextService(MeteredClient(engine.client), tokenizer, model_id="tiny")
    server = await serve_http(service, port=0)
    told_at: list[int] = []
    abort = engine.scheduler.abort

    def noting(*args: Any) -> Any:
        told_at.append(engine.scheduler.counters.steps)
        return abort(*args)

    engine.scheduler.abort = noting
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
            async with http.stream("POST", "/v1/completions", json=BODY) as reply:
                lines = reply.aiter_lines()
                while not (await anext(lines)).startswith("data: "):
                    pass
                during = await _metrics(http)
                assert during["num_requests_running"] == 1 and during["kv_cache_usage_perc"] > 0
            # The tab is closed; nothing else runs, so the engine's last step is the last that this request had.
            await until(lambda: told_at and engine.client.stats().kv_usage == 0, "the pages were free")
            after = await _metrics(http)
        assert after["num_requests_running"] == 0 and after["kv_cache_usage_perc"] == 0
        assert after["engine_steps_total"] - told_at[0] <= 2
        assert after["generation_tokens_total"] < 400
        assert service.num_live == 0
    finally:
        del engine.scheduler.abort
        await server.stop()
