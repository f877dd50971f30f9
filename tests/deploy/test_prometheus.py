"""The dashboard's and the alerts' queries: read by a PromQL parser, held to what a server exports, and run by Prometheus itself
where there is one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import promql_parser as promql
import pytest
import yaml

from serving.frontends.app import serve_http
from serving.metrics import MeteredClient
from serving.metrics.catalog import BY_NAME, LABELS, PREFIX, SPECS, Spec
from tests.mock_engine import MockEngine, mock_service

DEPLOY = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "deploy"
RULES = DEPLOY / "prometheus_alerts.yaml"
DASHBOARD = json.loads((DEPLOY / "grafana_dashboard.json").read_text())
GRAFANA = {"$model": ".*", "$__rate_interval": "1m", "$__interval": "15s", "$__range": "30m"}
SCRAPES_OWN = {"instance", "job"}


def queries() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of every panel and alert, with Grafana's variables filled in."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            expr = target["expr"]
            for name, value in GRAFANA.items():
                expr = expr.replace(name, value)
            yield panel["title"], expr
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


QUERIES = list(queries())


def nodes(expr: Any) -> Iterator[Any]:
    """Every part of a parsed expression."""
    yield expr
    for name in ("expr", "lhs", "rhs", "param", "vector_selector", "args"):
        part = getattr(expr, name, None)
        for one in part if isinstance(part, list) else [part]:
            if one is not None and type(one).__module__ == type(expr).__module__ and name != "modifier":
                yield from nodes(one)


def spec_of(sample: str) -> Spec | None:
    """The metric that a sample belongs to."""
    name = sample.removeprefix(PREFIX)
    for end in ("", "_total", "_bucket", "_sum", "_count"):
        spec = BY_NAME.get(name.removesuffix(end)) if name.endswith(end) else None
        if spec is not None and (spec.kind == "histogram") == (end in ("_bucket", "_sum", "_count")):
            return spec if spec.kind == "histogram" or spec.sample == sample else None
    return None


@pytest.mark.parametrize(("where", "query"), QUERIES, ids=[f"{where}-{i}" for i, (where, _) in enumerate(QUERIES)])
def test_queries_ask_for_what_the_catalog_has(where: str, query: str):
    parts = list(nodes(promql.parse(query)))
    selectors = [part for part in parts if isinstance(part, promql.VectorSelector)]
    assert selectors
    labels = {"le", *LABELS, *SCRAPES_OWN}
    for selector in selectors:
        spec = spec_of(selector.name)
        assert spec is not None, selector.name
        labels |= set(spec.labels)
        known = {*LABELS, *spec.labels, *SCRAPES_OWN, "le"}
        assert {matcher.name for matcher in selector.matchers.matchers} <= known, selector.name
    for part in parts:
        if isinstance(part, promql.AggregateExpr) and part.modifier is not None:
            assert set(part.modifier.labels) <= labels


def test_there_is_something_to_ask():
    assert len(QUERIES) > 30 and {where for where, _ in QUERIES} >= {"Time to first token", "JaxserveEngineDead"}
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
            assert spec_of(metric) is not None and label in LABELS


def test_the_dashboards_panels_do_not_overlap():
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        g = panel["gridPos"]
        mine = {(x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])}
        assert not cells & mine and g["x"] + g["w"] <= 24, panel["title"]
        cells |= mine


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_takes_the_rules():
    found = subprocess.run(["promtool", "check", "rules", str(RULES)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


@contextlib.asynccontextmanager
async def prometheus(target: str, folder: pathlib.Path) -> AsyncIterator[httpx.AsyncClient]:
    """The API of a Prometheus that scrapes `target` ("host:port") and evaluates our rules, every second."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "jaxserve", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}", stdout=quiet, stderr=quiet,
    )  # fmt: skip
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=30) as client:
            yield client
    finally:
        process.terminate()
        await process.wait()


async def asked(client: httpx.AsyncClient, query: str) -> list[Any]:
    """What an instant query finds."""
    reply = (await client.get("/query", params={"query": query})).json()
    assert reply["status"] == "success", (query, reply)
    return reply["data"]["result"]


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
async def test_a_real_prometheus_finds_what_the_queries_ask_for(tmp_path):
    client = MeteredClient(MockEngine(reply="abc"))
    client.metrics.set_startup({"load": 1.0})
    server = await serve_http(mock_service(client), port=0)
    async with prometheus(server.url.removeprefix("http://"), tmp_path) as api, asyncio.timeout(90):
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            assert (await http.post("/v1/completions", json={"prompt": "a", "n": 2})).status_code == 200
        while True:
            with contextlib.suppress(httpx.TransportError):
                if await asked(api, "jaxserve:request_success_total > 0"):
                    break
            await asyncio.sleep(0.2)
        for spec in SPECS:
            if spec.always:
                sample = f"{spec.sample}_count" if spec.kind == "histogram" else spec.sample
                assert await asked(api, sample), sample
        for where, query in QUERIES:
            await asked(api, query)
            for selector in nodes(promql.parse(query)):
                if isinstance(selector, promql.VectorSelector) and spec_of(selector.name).always:  # type: ignore[union-attr]
                    assert await asked(api, selector.name), (where, selector.name)
        groups: list[dict[str, Any]] = []
        while not groups or any(rule["health"] == "unknown" for rule in groups[0]["rules"]):
            groups = (await api.get("/rules")).json()["data"]["groups"]
            await asyncio.sleep(0.2)
        assert {rule["health"] for rule in groups[0]["rules"]} == {"ok"}
    await server.stop()
