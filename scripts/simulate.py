#!/usr/bin/env python3
"""The real scheduler on a trace, against a cost model in place of a device.

    python scripts/simulate.py --trace sharegpt --rate 2 --requests 1000000
    python scripts/simulate.py --trace overload --rate 12 --policy fcfs priority --plot ttft.png
    python scripts/simulate.py --trace trace.jsonl --cost cost.json
    python scripts/simulate.py --trace agents --rate 1 --engines 4 --routing round-robin cache
    python scripts/simulate.py --trace rag --rate 4 --engines 8 --prefill-engines 0 2 4 --plot apart.svg
    python scripts/simulate.py --fit steps.jsonl --out cost.json      # steps recorded by scripts/bench.py --record
    python scripts/simulate.py --trace rag --requests 500 --write-trace rag.jsonl

A trace is a generator's name or a file of JSON lines (serving/simulator/trace.py says what is in one).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import gc
import itertools
import json
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from serving.boot.engine_flags import add_settings
from serving.engine.api.config import EngineConfig
from serving.engine.api.speculative import MAX_DRAFT_TOKENS, SpeculativeConfig
from serving.engine.scheduling.policy import KEYS
from serving.engine.scheduling.scheduler import SchedulerConfig
from serving.installation import extra
from serving.routing.apart import POLICIES as PREFILL_POLICIES
from serving.routing.policies import POLICIES, Balance
from serving.routing.router import Router
from serving.simulator.apart import Link
from serving.simulator.cluster import Cluster
from serving.simulator.cost import CostModel, fit, read_records
from serving.simulator.report import Report
from serving.simulator.sharing import Sharing
from serving.simulator.simulate import Simulation
from serving.simulator.trace import GENERATORS, TraceRequest, read_trace, write_trace

DEFAULT_COST = pathlib.Path(__file__).resolve().parents[1] / "serving/simulator/cpu_cost.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """One simulation: everything that a worker process needs."""

    trace: str
    rate: float
    requests: int | None
    seed: int
    cost: CostModel
    config: SchedulerConfig
    asynchronous: bool
    max_num_queued_reqs: int | None
    engines: int = 1
    routing: str = "cache"
    balance: Balance = dataclasses.field(default_factory=Balance)
    acceptance: float = 0.0
    sharing: Sharing | None = None
    helpers: int = 0
    link: Link | None = None
    helper_policy: str = "auto"


Values = dict[str | None, dict[str, np.ndarray]]
"""Of each priority and tenant (None: of all), what PLOTTED names, seconds."""
PLOTTED = {"ttft": "time to first token, s", "worst_gap": "longest gap between two tokens of a request, s"}

SHARES = np.linspace(0.0, 1.0, 101)
"""Of the requests, at which a plot has points."""


def values_of(report: Report, groups: Sequence[str | None]) -> Values:
    """What is plotted of a run."""
    return {group: {metric: report.values(metric, group) for metric in PLOTTED} for group in groups}


def requests_of(trace: str, rate: float, seed: int, count: int | None) -> Iterator[TraceRequest]:
    """A generator's first `count` requests, or a file's."""
    source = GENERATORS[trace](rate, seed) if trace in GENERATORS else read_trace(trace)
    return itertools.islice(source, count)


def simulate(run: Run) -> tuple[dict[str, object], Values]:
    """The run's summary, and what is plotted of it."""
    if run.engines > 1:
        return simulate_cluster(run)
    simulation = Simulation(
        run.config,
        run.cost,
        asynchronous=run.asynchronous,
        max_num_queued_reqs=run.max_num_queued_reqs,
        acceptance=run.acceptance,
    )
    report = Report()
    for outcome in simulation.run(requests_of(run.trace, run.rate, run.seed, run.requests)):
        report.add(outcome)
    groups: list[str | None] = list(report.groups) if len(report.groups) > 1 else [None]
    return report.summary(simulation.totals), values_of(report, groups)


@contextlib.contextmanager
def few_collections() -> Iterator[None]:
    """A thousand engines are many objects that live long: looking for garbage among them again and again takes a sixth of it."""
    usual = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()


def simulate_cluster(run: Run) -> tuple[dict[str, object], Values]:
    """The same of several engines behind a router."""
    router = Router(run.routing, run.balance)
    cluster = Cluster(
        run.config,
        run.cost,
        run.engines - run.helpers,
        router,
        asynchronous=run.asynchronous,
        max_num_queued_reqs=run.max_num_queued_reqs,
        acceptance=run.acceptance,
        sharing=run.sharing,
        helpers=run.helpers,
        link=run.link,
        helper_policy=run.helper_policy,
    )
    report = Report()
    with few_collections():
        for outcome in cluster.run(requests_of(run.trace, run.rate, run.seed, run.requests)):
            report.add(outcome)
    summary = report.summary(cluster.totals)
    summary["device_busy"] = round(cluster.totals.busy / (cluster.totals.seconds * run.engines or 1.0), 4)
    summary |= {
        "computed_prompt_tokens": report.prompt_tokens - report.cached_tokens,
        "worst_imbalance": cluster.totals.worst_imbalance,
        "requests_an_engine": [min(t.routed for t in cluster.targets), max(t.routed for t in cluster.targets)],
        "decisions": {reason: count for (_, reason), count in sorted(router.decisions.items())},
    }
    if cluster.helpers is not None:
        summary["prefills"] = dict(cluster.helpers.decisions)
    return summary, values_of(report, [None])


def plot(path: str, results: dict[str, tuple[dict[str, object], Values]]) -> None:
    """The share of requests whose first token came, and whose longest gap was, within a time: a line a policy and group."""
    try:
        import matplotlib
    except ImportError:
        sys.exit(f"--plot needs matplotlib: {extra('plot')}.")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: a fifth of the size
    import matplotlib.pyplot as plt

    figure, each = plt.subplots(1, len(PLOTTED), figsize=(11, 4.2), dpi=110, sharey=True)
    for (metric, label), axes in zip(PLOTTED.items(), each, strict=True):
        for policy, (_, groups) in results.items():
            for group, of in groups.items():
                if len(of[metric]):
                    name = policy if group is None else f"{policy}: {group}"
                    axes.plot(np.quantile(of[metric], SHARES), SHARES, label=name)
        axes.set(xlabel=label, ylim=(0, 1), xscale="log")
        axes.grid(alpha=0.3)
    each[0].set(ylabel="share of requests")
    each[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)


def describe(policy: str, summary: dict[str, object]) -> str:
    """A few lines for a person."""
    lines = [f"policy {policy}"]
    groups = summary.get("by_group")
    flat = {k: v for k, v in summary.items() if k != "by_group"}
    if isinstance(groups, dict):
        flat |= {f"{metric} ({group})": of[metric] for group, of in groups.items() for metric in ("ttft", "e2e")}
    for key, value in flat.items():
        if isinstance(value, dict) and value and all(isinstance(v, float) for v in value.values()):
            value = "  ".join(f"{p} {v:.4g}" for p, v in value.items()) + " s"
        lines.append(f"  {key:28} {value}")
    return "\n".join(lines)


def policy_settings(policy: str) -> dict[str, Any]:
    """'priority+fair' -> what SchedulerConfig calls it.

    Raises:
        ValueError: a word that is none of these.
    """
    order, *more = policy.split("+")
    if order not in KEYS or not set(more) <= {"prefix", "fair"}:
        raise ValueError(f"{policy!r} is not {' or '.join(sorted(KEYS))}, with +prefix or +fair behind it.")
    return {"policy": order, "prefix_first": "prefix" in more, "fair_share": "fair" in more}


def engine_config(args: argparse.Namespace, policy: str, seqs: int, tokens: int) -> EngineConfig:
    """What a server with these settings would be started with."""
    return EngineConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_model_len=args.max_model_len,
        page_size=args.page_size or 16,
        enable_prefix_caching=args.enable_prefix_caching,
        speculative_config=SpeculativeConfig("ngram", num_speculative_tokens=args.draft_tokens)
        if args.draft_tokens
        else None,
        **policy_settings(policy),
    )


def checked_policy(policy: str) -> str:
    try:
        policy_settings(policy)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return policy


SETTINGS = (
    "max_num_seqs", "max_num_batched_tokens", "max_model_len", "page_size", "max_num_queued_reqs", "enable_prefix_caching",
    "async_scheduling", "seed",
)  # fmt: skip
"""Settings of the server that a simulation has too."""


def add_sharing_flags(parser: argparse.ArgumentParser) -> None:
    """What scripts/bench_sharing.py tells of engines on one machine."""
    parser.add_argument(
        "--slowdown", type=float, nargs="+", default=[], metavar="X",
        help="the engines share one machine: how many times longer a step that computes prompts takes while 1, 2, ... of them are "
        "in a step, as scripts/bench_sharing.py measures it (default: each has a machine of its own)",
    )  # fmt: skip
    parser.add_argument(
        "--decode-slowdown", type=float, nargs="+", default=[], metavar="X", help="and one without prompts (default: the same)",
    )  # fmt: skip
    parser.add_argument(
        "--way", type=float, nargs="+", default=[], metavar="S",
        help="and seconds until a token that was computed is seen by whoever asked, while 1, 2, ... have requests",
    )  # fmt: skip
    parser.add_argument(
        "--front", type=float, nargs=2, default=(0.0, 0.0), metavar="S",
        help="and seconds that a gateway and its clients, who are on this machine too, compute for a request and for a token",
    )  # fmt: skip
    parser.add_argument("--cores", type=int, default=2, metavar="N", help="of that machine (default: %(default)s)")


def sharing_of(args: argparse.Namespace) -> Sharing | None:
    """What those flags say; None where each engine has a machine of its own."""
    if not args.slowdown:
        return None
    request_s, token_s = args.front
    return Sharing(tuple(args.slowdown), tuple(args.decode_slowdown), tuple(args.way), (request_s, token_s), args.cores)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trace", default="sharegpt", help=f"{', '.join(GENERATORS)}, or a file (default: %(default)s)"
    )
    parser.add_argument("--rate", type=float, default=1.0, help="requests (multi-turn: conversations) a second")
    parser.add_argument("--requests", type=int, help="how many; a file's all by default, 10000 of a generator")
    parser.add_argument(
        "--policy",
        nargs="+",
        default=["fcfs"],
        type=checked_policy,
        metavar="P",
        help=f"one run each: {' or '.join(sorted(KEYS))}, with +prefix (longest cached prefix first) or +fair (tenants)",
    )
    parser.add_argument("--cost", help=f"cost model (default: {DEFAULT_COST.name}, the default model on 2 CPU cores)")
    defaults = vars(EngineConfig()) | {"max_model_len": 4096}
    add_settings(
        parser.add_argument_group("settings, as the server's"),
        {name: defaults[name] for name in SETTINGS},
        help=dict.fromkeys(("max_num_seqs", "max_num_batched_tokens"), "default: the cost model's"),
    )
    parser.add_argument(
        "--draft-tokens",
        type=int,
        default=0,
        metavar="K",
        help="drafts of a request in a step at most; they cost nothing",
    )
    parser.add_argument(
        "--acceptance", type=float, default=0.7, metavar="P", help="how likely a draft is right if those before it are"
    )
    parser.add_argument("--num-pages", type=int, default=8192, help="of each engine")
    parser.add_argument("--engines", type=int, default=1, metavar="N", help="so many engines alike behind a router")
    parser.add_argument(
        "--routing", nargs="+", default=["cache"], choices=tuple(POLICIES), metavar="P",
        help=f"with several engines, one run each: {', '.join(POLICIES)}",
    )  # fmt: skip
    add_sharing_flags(parser)
    parser.add_argument(
        "--prefill-engines", type=int, nargs="+", default=[0], metavar="N",
        help="so many of the engines compute prompts for the others (one run each), where the gateway's rule says that it pays",
    )  # fmt: skip
    parser.add_argument("--prefill-policy", choices=PREFILL_POLICIES, default="auto", help="as the gateway's")
    usual_link = Link()
    parser.add_argument(
        "--transfer-token-s", type=float, default=usual_link.token_s, metavar="S",
        help="seconds that the pages of a token take from engine to engine (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--transfer-lag-s", type=float, default=usual_link.lag_s, metavar="S",
        help="and from a prompt's end until its last page can be there (default: %(default)s)",
    )  # fmt: skip
    usual = Balance()
    parser.add_argument(
        "--balance-abs-threshold", type=int, default=usual.abs_threshold, metavar="N", help="as the gateway's"
    )
    parser.add_argument(
        "--balance-rel-threshold", type=float, default=usual.rel_threshold, metavar="X", help="as the gateway's"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a policy")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="distributions of the time to first token and of the longest gap, PNG or SVG (needs matplotlib)",
    )
    parser.add_argument("--write-trace", metavar="FILE", help="write the trace and stop")
    parser.add_argument("--fit", metavar="STEPS", help="fit a cost model to recorded steps and stop")
    parser.add_argument("--out", metavar="FILE", help="where --fit writes the model")
    return parser


def run_name(args: argparse.Namespace, policy: str, routing: str, helpers: int) -> str:
    """What tells a run from the others."""
    several = f"{policy}, {routing}" if args.engines > 1 else policy
    return f"{several}, {helpers} prefill" if any(args.prefill_engines) else several


def fit_cost(args: argparse.Namespace) -> None:
    records = list(read_records(args.fit))
    model = fit(records, args.max_num_seqs or 64, args.max_num_batched_tokens or 1024)
    if args.out:
        model.save(args.out)
    errors = np.abs(model.errors(records))
    total = sum(r.seconds for r in records)
    bias = sum(model.seconds(r.shape) for r in records) / total - 1
    print(
        f"{len(records)} steps: median error {np.median(errors):.1%}, p90 {np.percentile(errors, 90):.1%}, "
        f"of the total time {bias:+.1%}"
    )


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program where arguments make no sense."""
    if args.trace not in GENERATORS and not pathlib.Path(args.trace).is_file():
        parser.error(f"--trace {args.trace}: neither a file nor one of {', '.join(GENERATORS)}.")
    if args.rate <= 0:
        parser.error(f"--rate must be above 0, got {args.rate}.")
    if args.engines < 1:
        parser.error(f"--engines must be at least 1, got {args.engines}.")
    if any(one < 1 for one in (*args.slowdown, *args.decode_slowdown)):
        least = min(*args.slowdown, *args.decode_slowdown)
        parser.error(f"--slowdown and --decode-slowdown take factors of at least 1, got {least:g}.")
    if (args.decode_slowdown or args.way or any(args.front)) and not args.slowdown:
        parser.error("--decode-slowdown, --way and --front are of engines that share a machine: give --slowdown too.")
    if args.slowdown and not args.async_scheduling:
        parser.error(
            "--slowdown needs asynchronous scheduling: engines whose steps wait for each other are not simulated."
        )
    if any(not 0 <= one < args.engines for one in args.prefill_engines):
        parser.error(
            f"--prefill-engines must leave engines that decode: below --engines, {args.engines}, got {max(args.prefill_engines)}."
        )
    if min(*args.front, *args.way) < 0:
        parser.error(f"--way and --front take seconds, got {min(*args.front, *args.way)}.")
    if args.cores < 1:
        parser.error(f"--cores must be at least 1, got {args.cores}.")
    if any(args.prefill_engines) and args.slowdown:
        parser.error("--prefill-engines are on machines of their own: leave --slowdown out.")
    if min(args.transfer_token_s, args.transfer_lag_s) < 0:
        least = min(args.transfer_token_s, args.transfer_lag_s)
        parser.error(f"--transfer-token-s and --transfer-lag-s must be at least 0, got {least:g}.")
    if not 0 <= args.draft_tokens <= MAX_DRAFT_TOKENS:
        parser.error(f"--draft-tokens must be from 0 to {MAX_DRAFT_TOKENS}, got {args.draft_tokens}.")
    if not 0 <= args.acceptance <= 1:
        parser.error(f"--acceptance must be from 0 to 1, got {args.acceptance}.")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    check(parser, args)
    if args.fit:
        return fit_cost(args)
    count = args.requests or (10_000 if args.trace in GENERATORS else None)
    if args.write_trace:
        written = write_trace(args.write_trace, requests_of(args.trace, args.rate, args.seed, count))
        return print(f"{written} requests written to {args.write_trace}")
    cost = CostModel.load(args.cost or DEFAULT_COST)
    seqs = args.max_num_seqs or cost.max_num_seqs
    tokens = args.max_num_batched_tokens or cost.max_num_batched_tokens
    cost = dataclasses.replace(cost, max_num_seqs=seqs, max_num_batched_tokens=tokens, draft_tokens=args.draft_tokens)
    table = cost.buckets
    balance = Balance(abs_threshold=args.balance_abs_threshold, rel_threshold=args.balance_rel_threshold)
    routings = args.routing if args.engines > 1 else args.routing[:1]
    runs = {
        run_name(args, policy, routing, helpers): Run(
            args.trace,
            args.rate,
            count,
            args.seed,
            cost,
            SchedulerConfig.of(
                engine_config(args, policy, seqs, tokens),
                max_chunk_tokens=table.max_chunk,
                max_chunk_rows=table.max_rows,
                num_pages=args.num_pages,
                buckets=table,
                step_seconds=cost.decode_steps() if args.draft_tokens else (),
            ),
            args.async_scheduling,
            args.max_num_queued_reqs,
            args.engines,
            routing,
            balance,
            args.acceptance,
            sharing_of(args),
            helpers,
            Link(args.transfer_token_s, args.transfer_lag_s, tokens),
            args.prefill_policy,
        )
        for policy in args.policy
        for routing in routings
        for helpers in args.prefill_engines
    }
    if len(runs) == 1:
        results = {policy: simulate(run) for policy, run in runs.items()}
    else:
        workers, context = min(len(runs), os.cpu_count() or 1), multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
            results = dict(zip(runs, pool.map(simulate, runs.values()), strict=True))
    for policy, (summary, _) in results.items():
        print(json.dumps({"policy": policy} | summary) if args.json else describe(policy, summary))
    if args.plot:
        plot(args.plot, results)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
