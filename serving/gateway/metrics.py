"""What a gateway counts beside what every server does: decisions, targets, what it knows of their caches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.gateway.pool import Pool
from serving.gateway.prefills import WHY
from serving.metrics.catalog import PREFIX, Spec


def _spec(name: str, kind: str, text: str, *labels: str) -> Spec:
    return Spec(f"gateway_{name}", kind, text, labels=labels)


DECISIONS = _spec(
    "decisions",
    "counter",
    "Requests routed, by policy and reason: endpoint, session, prefix, load, imbalance, kv, turn, random, only.",
    "policy",
    "reason",
)
RETRIES = _spec(
    "retries", "counter", "Requests that a target refused before their first token, by its reason.", "reason"
)
MATCHED = _spec("matched_tokens", "counter", "Prompt tokens that the chosen targets had, as far as was known.")
PROMPT = _spec("prompt_tokens", "counter", "Prompt tokens of all routed requests.")
MOVED = _spec("moved_sessions", "counter", "Times a session's target was gone or overloaded, and another was taken.")
IMBALANCE = _spec("imbalance", "gauge", "Requests at the busiest target beyond those at the least busy one.")
HEALTHY = _spec("target_healthy", "gauge", "1 while a target takes requests.", "target", "number")
LOAD = _spec("target_requests", "gauge", "Requests that run or wait at a target.", "target", "number")
KV = _spec(
    "target_kv_usage_perc", "gauge", "Fraction of a target's KV pages in use by live requests.", "target", "number"
)
ROUTED = _spec("target_routed", "counter", "Requests given to a target.", "target", "number")
BLOCKS = _spec("target_prefix_blocks", "gauge", "Blocks of prefixes known of a target.", "target", "number")

PREFILLS = _spec(
    "prefills",
    "counter",
    "Where there are --prefill-target engines: requests by where their prompts were computed, and why: apart, short, alone, busy, "
    "unfit, none; and peer: another target has a longer part of it, to be fetched from there.",
    "decision",
)
PREFILL_FAILURES = _spec("prefill_failures", "counter", "Prompts that an engine of --prefill-target refused or lost.")
PREFILL_QUEUED = _spec(
    "prefill_queued_tokens", "gauge", "Prompt tokens given to such an engine and not computed yet.", "target"
)

SPECS = (
    DECISIONS, RETRIES, MATCHED, PROMPT, MOVED, IMBALANCE, HEALTHY, LOAD, KV, ROUTED, BLOCKS, PREFILLS, PREFILL_FAILURES,
    PREFILL_QUEUED,
)  # fmt: skip


class GatewayMetrics(Collector):
    """Reads a pool when it is scraped."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at a scrape."""
        router = self._pool.router
        yield _family(DECISIONS, dict(router.decisions))
        yield _family(RETRIES, {(reason,): count for reason, count in router.retries.items()})
        for spec, value in (
            (MATCHED, router.matched_tokens),
            (PROMPT, router.prompt_tokens),
            (MOVED, router.moved_sessions),
            (IMBALANCE, router.imbalance),
        ):
            yield _family(spec, {(): value})
        each = [(name, str(one.number), one) for name, one in self._pool.members.items()]
        yield _family(HEALTHY, {(name, n): float(one.client.healthy) for name, n, one in each})
        yield _family(LOAD, {(name, n): one.target.load for name, n, one in each})
        yield _family(KV, {(name, n): one.target.kv_usage for name, n, one in each})
        yield _family(ROUTED, {(name, n): one.target.routed for name, n, one in each})
        yield _family(BLOCKS, {(name, n): len(router.prefixes(name)) for name, n, _ in each})
        prefills = self._pool.prefills
        yield _family(PREFILLS, {(decision,): prefills.decisions[decision] for decision in WHY})
        yield _family(PREFILL_FAILURES, {(): prefills.failures})
        yield _family(PREFILL_QUEUED, {(one.name,): one.queued for one in prefills.helpers.values()})


def _family(spec: Spec, values: Mapping[Any, float]) -> Metric:
    kind = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
    metric = kind(PREFIX + spec.name, spec.text, labels=spec.labels)
    for labels, value in values.items():
        metric.add_metric(labels, value)
    return metric


def markdown_table() -> str:
    """The gateway's table in docs/metrics.md."""
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for spec in SPECS:
        labels = ", ".join(f"`{label}`" for label in spec.labels) or "–"
        rows.append(f"| `{spec.sample}` | {spec.kind} | {labels} | {spec.text} |")
    return "\n".join(rows) + "\n"
