"""Does the simulator predict this machine? Records steps, fits a cost model, and replays a fresh trace in both."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from typing import Any

from benchmarks.driving import span, throughput
from benchmarks.local import Local, StepRecorder, add_engine_arguments, local_engine
from benchmarks.report import show
from benchmarks.work import mixed
from serving.simulator.cost import CostModel, fit, write_records
from serving.simulator.simulate import Outcome, Simulation
from serving.simulator.trace import TraceRequest, write_trace

LONELY, LONGEST = 32, 1024
"""Prompts of all lengths that are computed one after the other: steps of one prompt alone, and pieces far behind its beginning, are
seldom in a mixed load."""
BESIDE, BESIDE_PROMPT, BESIDE_TOKENS = 12, 0.4, 24
"""And so many of them while others stream, whose prompts are that share of the longest."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=80, help="of the calibration, and of each replayed trace")
    parser.add_argument(
        "--load", type=float, nargs="+", default=[0.6, 1.5], help="shares of what the machine can serve"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", metavar="FILE", help="write the recorded steps")
    parser.add_argument("--save-cost", metavar="FILE", help="write the fitted model, for scripts/simulate.py --cost")
    parser.add_argument("--write-trace", metavar="FILE", help="write the last replayed trace")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> None:
    with local_engine(args) as local:
        before = local.engine.client.stats()
        with StepRecorder(local) as recorder:
            burst = local.run(at_once(mixed(args.requests, 1.0, args.seed)), private=True)
            capacity = len(burst) / span(burst)
            local.run(mixed(args.requests // 2, 0.5 * capacity, args.seed + 1), private=True)
            longest = min(local.info.max_model_len - 8, LONGEST)
            for i in range(LONELY):
                local.run([TraceRequest(0.0, 16 + (longest - 16) * i // (LONELY - 1), 2)], private=True)
            for i in range(BESIDE):
                local.run(beside(i, longest), private=True)
        after = local.engine.client.stats()
        host_s = (after.host_time_s_total - before.host_time_s_total) / (after.num_steps - before.num_steps)
        cost = fit(recorder.records, local.info.max_num_seqs, local.info.max_num_batched_tokens, host_s=host_s)
        if args.record:
            write_records(args.record, recorder.records)
        if args.save_cost:
            cost.save(args.save_cost)
        for i, load in enumerate(args.load):
            trace = mixed(args.requests, load * capacity, args.seed + 3 + i)
            measured = local.run(trace, private=True)
            sent = [dataclasses.replace(r, arrival=o.arrival) for r, o in zip(trace, measured, strict=True)]
            sent.sort(key=lambda r: r.arrival)
            show({"scenario": "predict", "load": load} | compare(measured, predict(local, cost, sent)), args.json)
            if args.write_trace:
                write_trace(args.write_trace, sent)


def beside(number: int, longest: int) -> list[TraceRequest]:
    """One, two or three streams far behind their beginnings, and a prompt that comes while they run."""
    streams = [TraceRequest(0.0, int(BESIDE_PROMPT * longest), BESIDE_TOKENS)] * (1 + number % 3)
    return [*streams, TraceRequest(0.0, 16 + (longest - 16) * number // (BESIDE - 1), 2)]


def at_once(trace: list[TraceRequest]) -> list[TraceRequest]:
    return [dataclasses.replace(r, arrival=0.0) for r in trace]


def predict(local: Local, cost: CostModel, trace: list[TraceRequest]) -> list[Outcome]:
    """The trace in the simulator, under the engine's own scheduler configuration."""
    simulation = Simulation(local.engine.scheduler.config, cost, asynchronous=local.engine.config.async_scheduling)
    return list(simulation.run(trace))


def compare(measured: list[Outcome], predicted: list[Outcome]) -> dict[str, Any]:
    """Measured, predicted and relative error of throughput and time to first token."""
    result: dict[str, Any] = {}
    for name, of in {
        "output_tok_s": throughput,
        "ttft_mean": lambda outcomes: statistics.fmean(o.ttft for o in outcomes),
        "ttft_median": lambda outcomes: statistics.median(o.ttft for o in outcomes),
        "tpot_median": lambda outcomes: statistics.median(o.tpot for o in outcomes if o.output_tokens > 1),
    }.items():
        real, virtual = of(measured), of(predicted)
        error = round(virtual / real - 1, 4) if real else None  # tokens that piled up and came as one have no gaps
        result[name] = {"measured": round(real, 4), "predicted": round(virtual, 4), "error": error}
    return result
