"""What `/metrics` shows of several models beside what it shows of each: where they are, and how often they moved."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.engine.api.client import Where
from serving.fleet.keeper import Keeper

PREFIX = "jaxserve:"


class FleetMetrics(Collector):
    """Reads a keeper and its members at each scrape."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        state = GaugeMetricFamily(
            f"{PREFIX}model_state", "1 for the state that a model is in", labels=("model_name", "state")
        )
        taken = GaugeMetricFamily(
            f"{PREFIX}model_memory_bytes", "What a model takes of the memory for models", labels=("model_name",)
        )
        switches = CounterMetricFamily(
            f"{PREFIX}model_switches", "How often a model was loaded or woken", labels=("model_name",)
        )
        last = GaugeMetricFamily(
            f"{PREFIX}model_switch_seconds",
            "How long it took the last time, by what was done",
            labels=("model_name", "kind"),
        )
        waiting = GaugeMetricFamily(
            f"{PREFIX}model_requests",
            "Requests that run with a model or wait for it to be loaded",
            labels=("model_name",),
        )
        for member in self._keeper.members:
            for where in Where:
                state.add_metric((member.name, where.value), float(member.where is where))
            taken.add_metric((member.name,), float(member.bytes))
            switches.add_metric((member.name,), float(member.switches))
            waiting.add_metric((member.name,), float(member.in_use))
        for name, kind, seconds in {(name, kind): (name, kind, s) for name, kind, s in self._keeper.seconds}.values():
            last.add_metric((name, kind), seconds)
        limit = GaugeMetricFamily(f"{PREFIX}models_memory_limit_bytes", "What models may take together")
        limit.add_metric((), float(self._keeper.memory))
        yield from (state, taken, switches, last, waiting, limit)
