"""How results are printed."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from typing import Any

from benchmarks.driving import span, throughput
from serving.installation import extra, version
from serving.simulator.report import Report
from serving.simulator.simulate import Outcome


def standard_row(engine: str, concurrency: int, output_tokens: int, seconds: float, startup_s: float) -> dict[str, Any]:
    """The row of the standard workload, the same from every engine."""
    return {
        "engine": engine,
        "concurrency": concurrency,
        "output_tok_s": round(concurrency * output_tokens / seconds, 1),
        "seconds": round(seconds, 3),
        "startup_s": round(startup_s, 2),
    }


def latencies(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Percentiles of what a client felt, and what went through."""
    report = Report()
    for outcome in outcomes:
        report.add(outcome)
    failed = {reason: n for reason, n in report.reasons.items() if reason not in ("stop", "length")}
    return {
        "requests": len(outcomes),
        "failed": failed,
        "seconds": round(span(outcomes), 3),
        "output_tok_s": round(throughput(outcomes), 1),
        **{metric: report.percentiles(metric) for metric in ("ttft", "tpot", "worst_gap", "e2e")},
    }


def show(row: dict[str, Any], as_json: bool) -> None:
    """One result: a JSON line, or lines for a person."""
    if as_json:
        print(json.dumps(row), flush=True)
        return
    for key, value in row.items():
        if isinstance(value, dict):
            value = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
        print(f"{key:28} {value}")
    print(flush=True)


def pyplot() -> Any:
    """matplotlib's, drawing into files.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit(f"--plot needs matplotlib: {extra('plot')}.") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def machine() -> dict[str, Any]:
    """Date, processor and versions: what a figure means nothing without."""
    import importlib.metadata as metadata

    model = platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "jaxserve": version(),
        **{name: metadata.version(name) for name in ("jax", "flax")},
    }
