"""What a run came to: percentiles, throughput, sharing and waste."""

from __future__ import annotations

import math
from array import array
from collections import Counter, defaultdict

import numpy as np

from serving.simulator.simulate import Outcome, RunTotals, finished_well

METRICS = ("ttft", "tpot", "worst_gap", "e2e")
PERCENTILES = (50, 90, 95, 99)


class Report:
    """Collects outcomes in a few machine words each: a million requests take 40 MB."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, array[float]]] = defaultdict(lambda: {m: array("d") for m in METRICS})
        self.reasons: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.requests = 0

    def add(self, outcome: Outcome) -> None:
        self.requests += 1
        self.reasons[outcome.reason] += 1
        self.output_tokens += outcome.output_tokens
        if finished_well(outcome):
            self.prompt_tokens += outcome.prompt_tokens
            self.cached_tokens += outcome.cached_tokens
            values = self._values[group_of(outcome)]
            for metric in METRICS:
                value = getattr(outcome, metric)
                if not math.isnan(value):
                    values[metric].append(value)

    @property
    def groups(self) -> list[str]:
        """Labels of the priorities and tenants that occurred."""
        return sorted(self._values)

    def values(self, metric: str, group: str | None = None) -> np.ndarray:
        """Every value of a metric, of one group or of all."""
        kept = [v[metric] for g, v in sorted(self._values.items()) if group in (None, g)]
        return np.concatenate([np.frombuffer(a, np.float64) for a in kept if a] or [np.zeros(0)])

    def percentiles(self, metric: str, group: str | None = None) -> dict[str, float]:
        values = self.values(metric, group)
        if not len(values):
            return {}
        return {
            f"p{p}": round(float(v), 6) for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
        }

    def summary(self, totals: RunTotals) -> dict[str, object]:
        """Everything as plain data, for JSON and for people."""
        result: dict[str, object] = {
            "requests": self.requests,
            "reasons": dict(self.reasons),
            "virtual_s": round(totals.seconds, 3),
            "wall_s": round(totals.wall, 3),
            "steps": totals.steps,
            "device_busy": round(totals.busy / totals.seconds, 4) if totals.seconds else 0.0,
            "output_tok_s": round(self.output_tokens / totals.seconds, 1) if totals.seconds else 0.0,
            "requests_s": round(self.requests / totals.seconds, 3) if totals.seconds else 0.0,
            "cached_share": round(self.cached_tokens / self.prompt_tokens, 4) if self.prompt_tokens else 0.0,
            "computed_tokens": totals.computed_tokens,
            "preemptions": totals.preemptions,
        }
        if totals.kv_allocated:
            result["kv_waste"] = round(1 - totals.kv_used / totals.kv_allocated, 4)
            result["kv_waste_contiguous"] = round(1 - totals.kv_used / totals.kv_contiguous, 4)
        for metric in METRICS:
            result[metric] = self.percentiles(metric)
        if len(self._values) > 1:
            result["by_group"] = {g: {m: self.percentiles(m, g) for m in ("ttft", "e2e")} for g in self.groups}
        return result


def group_of(outcome: Outcome) -> str:
    """Requests of equal priority and tenant are reported together."""
    return (
        f"priority {outcome.priority}" if outcome.tenant is None else f"{outcome.tenant}, priority {outcome.priority}"
    )
