"""Loads that show one property each. Every result is a ratio of two runs on the same engine in the same minute."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.driving import span, throughput
from benchmarks.local import Local, StepRecorder, add_engine_arguments, local_engine
from benchmarks.report import show
from benchmarks.work import mixed, uniform
from serving.engine.api.sampling_params import StructuredOutputs
from serving.engine.scheduling import policy as scheduling
from serving.simulator.simulate import Outcome
from serving.simulator.trace import TraceRequest, overload, rag, sharegpt


def median_ttft(outcomes: Sequence[Outcome]) -> float:
    return statistics.median(o.ttft for o in outcomes)


def prefix(local: Local, args: argparse.Namespace) -> dict[str, Any]:
    """A system prompt that every user shares: time to first token with and without sharing its pages."""
    users = [
        TraceRequest(0.0, args.system_tokens + args.own_tokens, args.output_tokens, prefix=((0, args.system_tokens),))
        for _ in range(args.users)
    ]
    local.forget_prefixes()
    local.run(users[:1])  # the system prompt has been seen before, as in any service that has one
    shared = local.run(users)
    private = local.run(users, private=True)
    return {
        "users": args.users,
        "system_tokens": args.system_tokens,
        "cached_share": round(sum(o.cached_tokens for o in shared) / sum(o.prompt_tokens for o in shared), 4),
        "ttft_median_shared_s": round(median_ttft(shared), 4),
        "ttft_median_private_s": round(median_ttft(private), 4),
        "ttft_ratio": round(median_ttft(private) / median_ttft(shared), 2),
        "throughput_ratio": round(throughput(shared) / throughput(private), 2),
    }


def rag_trace(local: Local, args: argparse.Namespace) -> dict[str, Any]:
    """Prompts of which half is one of many documents: prompt tokens computed against what is shared."""
    trace = list(itertools.islice(rag(args.rate, args.seed, documents=args.documents), args.requests))
    seen: set[int] = set()
    shareable = 0  # tokens of segments that an earlier prompt had: what a cache without limit and pages would save
    for request in trace:
        shareable += sum(length for segment, length in request.prefix if segment in seen)
        seen |= {segment for segment, _ in request.prefix}
    total = sum(r.prompt_tokens for r in trace)
    local.forget_prefixes()
    before = local.prefilled_tokens
    shared = local.run(trace)
    computed = local.prefilled_tokens - before
    before = local.prefilled_tokens
    private = local.run(trace, private=True)
    computed_private = local.prefilled_tokens - before
    return {
        "requests": len(trace),
        "prompt_tokens": total,
        "shareable_share": round(shareable / total, 4),
        "computed_cut": round(1 - computed / computed_private, 4),
        "ttft_ratio": round(median_ttft(private) / median_ttft(shared), 2),
        "throughput_ratio": round(throughput(shared) / throughput(private), 2),
    }


def longprompt(local: Local, args: argparse.Namespace) -> dict[str, Any]:
    """A long prompt among running streams: their worst gap between tokens against a step of a full budget."""
    streams = [TraceRequest(0.0, 64, args.stream_tokens) for _ in range(args.streams)]
    late = TraceRequest(args.after, args.prompt_tokens, 8)
    local.run([*streams, late], private=True)  # once unmeasured
    with StepRecorder(local) as recorder:
        outcomes = local.run([*streams, late], private=True)
    budget = local.info.max_num_batched_tokens
    full = [r.seconds for r in recorder.records if r.shape.decode and r.shape.chunk + r.shape.decode >= budget - 16]
    alone = [r.seconds for r in recorder.records if r.shape.decode and not r.shape.chunk]
    worst = max(o.worst_gap for o in outcomes[:-1])
    return {
        "streams": args.streams,
        "prompt_tokens": args.prompt_tokens,
        "budget": budget,
        "decode_step_s": round(statistics.median(alone), 4),
        "full_step_s": round(statistics.median(full), 4) if full else None,
        "worst_gap_s": round(worst, 4),
        "gap_in_full_steps": round(worst / statistics.median(full), 2) if full else None,
        "long_prompt_ttft_s": round(outcomes[-1].ttft, 3),
    }


def static(local: Local, args: argparse.Namespace) -> dict[str, Any]:
    """Mixed lengths: continuous batching against batches that start together and end with their longest.

    A static batch is what transformers' `generate` computes: every prompt padded to the batch's longest, every row decoded until
    the longest completion ends. Here its rows are requests of those lengths on the same engine, so that both sides have the same
    kernels, chunked prefill and asynchronous stepping; a static server's own step would not be faster. Tokens that nobody asked
    for do not count. With --pad-prompts 0 prompts keep their own lengths, as no static batch can without ragged kernels.
    """
    trace = [dataclasses.replace(r, arrival=0.0) for r in mixed(args.requests, 1.0, args.seed)]
    continuous = local.run(trace, private=True)
    seconds, ttfts, batch = 0.0, [], args.batch or local.info.max_num_seqs
    for start in range(0, len(trace), batch):
        group = trace[start : start + batch]
        same = {"output_tokens": max(r.output_tokens for r in group)}
        if args.pad_prompts:
            same["prompt_tokens"] = max(r.prompt_tokens for r in group)
        outcomes = local.run([dataclasses.replace(r, **same) for r in group], private=True)
        ttfts += [seconds + o.ttft for o in outcomes]
        seconds += span(outcomes)
    wanted = sum(r.output_tokens for r in trace)
    return {
        "requests": len(trace),
        "static_batch": batch,
        "prompts_padded": bool(args.pad_prompts),
        "continuous_tok_s": round(wanted / span(continuous), 1),
        "static_tok_s": round(wanted / seconds, 1),
        "throughput_ratio": round(seconds / span(continuous), 2),
        "ttft_median_continuous_s": round(median_ttft(continuous), 3),
        "ttft_median_static_s": round(statistics.median(ttfts), 3),
        "ttft_cut": round(1 - median_ttft(continuous) / statistics.median(ttfts), 3),
    }


def priority(local: Local, args: argparse.Namespace) -> dict[str, Any]:
    """Twice the load that can be served: time to first token of urgent requests, against the same ones at a low load.

    Ablations: --pacing 0 schedules each step a whole step ahead; --max-hurried 0 leaves no decode rows out for urgent prompts.
    """
    if not args.pacing:
        local.engine.loop.pipeline.pacer = None
    scheduling.MAX_HURRIED = args.max_hurried
    full = local.run([dataclasses.replace(r, arrival=0.0) for r in mixed(args.calibrate, 1.0, args.seed)], private=True)
    capacity = len(full) / span(full)
    trace = list(
        itertools.islice(overload(args.overload * capacity, args.seed, urgent_share=args.urgent_share), args.requests)
    )
    urgent = [r for r in trace if r.priority == 0]
    slower = (len(urgent) / urgent[-1].arrival) / (args.unloaded * capacity)
    alone = local.run([dataclasses.replace(r, arrival=r.arrival * slower) for r in urgent], private=True)
    outcomes = local.run(trace, private=True)
    unloaded = np.array([o.ttft for o in alone])
    loaded = np.array([o.ttft for o in outcomes if o.priority == 0])
    others = [o.ttft for o in outcomes if o.priority > 0]
    return {
        "capacity_requests_s": round(capacity, 3),
        "capacity_tok_s": round(throughput(full), 1),
        "overload": args.overload,
        "urgent": len(urgent),
        "urgent_p50_ttft_unloaded_s": round(float(np.median(unloaded)), 4),
        "urgent_p50_ttft_overload_s": round(float(np.median(loaded)), 4),
        "urgent_p95_ttft_unloaded_s": round(float(np.percentile(unloaded, 95)), 4),
        "urgent_p95_ttft_overload_s": round(float(np.percentile(loaded, 95)), 4),
        "others_p95_ttft_overload_s": round(float(np.percentile(others, 95)), 4),
        "output_tok_s_overload": round(throughput(outcomes), 1),
        "urgent_ratio": round(float(np.percentile(loaded, 95) / np.percentile(unloaded, 95)), 2),
    }


def waste(local: Local, args: argparse.Namespace) -> dict[str, Any]:
    """KV positions in allocated pages that hold nothing, on ShareGPT's lengths, sampled every step of a real run."""
    limit = local.info.max_model_len
    trace = [
        dataclasses.replace(
            r,
            arrival=0.0,
            prompt_tokens=min(r.prompt_tokens, limit // 2),
            output_tokens=min(r.output_tokens, limit // 2),
        )
        for r in itertools.islice(sharegpt(1.0, args.seed), args.requests)
    ]
    scheduler = local.engine.scheduler
    used = allocated = contiguous = 0
    schedule = scheduler.schedule

    def looking(now: float | None = None) -> Any:
        nonlocal used, allocated, contiguous
        plan = schedule(now)
        used += sum(r.num_computed for r in scheduler.running)
        allocated += (
            scheduler.config.page_size * sum(r.num_held for r in scheduler.running) / len(scheduler.config.windows)
        )
        contiguous += limit * len(scheduler.running)
        return plan

    scheduler.schedule = looking  # pyright: ignore[reportAttributeAccessIssue]
    try:
        local.run(trace, private=True)
    finally:
        del scheduler.schedule
    return {
        "requests": len(trace),
        "page_size": local.info.page_size,
        "waste_paged": round(1 - used / allocated, 4),
        "waste_contiguous": round(1 - used / contiguous, 4),
        "contiguous_positions": limit,
    }


def overhead(local: Local, args: argparse.Namespace) -> dict[str, Any]:
    """Sampling options against greedy: throughput of each as a share of greedy's, alternately."""
    trace = uniform(args.concurrency, 128, args.output_tokens)
    options: dict[str, dict[str, Any]] = {
        "greedy": {},
        "top_k_top_p": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 1},
        "penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.2},
        "logprobs": {"logprobs": 5},
    }
    rates: dict[str, list[float]] = {name: [] for name in options}
    for _ in range(args.repeat):
        for name, params in options.items():
            rates[name].append(throughput(local.run(trace, private=True, **params)))
    greedy = statistics.median(rates["greedy"])
    return {
        "concurrency": args.concurrency,
        "greedy_tok_s": round(greedy, 1),
        **{f"{name}_share": round(statistics.median(r) / greedy, 3) for name, r in rates.items() if name != "greedy"},
    }


LONG_LIST = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "count": {"type": "integer"}, "kind": {"enum": ["a", "b"]}},
        "required": ["name", "count", "kind"],
        "additionalProperties": False,
    },
}
"""A schema that no completion gets to the end of, so that every request makes the same number of tokens."""


def structured(local: Local, args: argparse.Namespace) -> dict[str, Any]:
    """A JSON schema on every request against none: throughput, alternately."""
    if local.grammars is None:
        raise ValueError("the engine was started without a tokenizer.")
    factory = local.grammars.compile(StructuredOutputs(json=LONG_LIST))
    trace = uniform(args.concurrency, 128, args.output_tokens)
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(args.repeat):
        for constrained in (False, True):
            outcomes = local.run(trace, private=True, constraint=factory if constrained else None)
            rates[constrained].append(throughput(outcomes))
    free, held = statistics.median(rates[False]), statistics.median(rates[True])
    return {
        "concurrency": args.concurrency,
        "free_tok_s": round(free, 1),
        "constrained_tok_s": round(held, 1),
        "constrained_share": round(held / free, 3),
    }


Scenario = Callable[[Local, argparse.Namespace], dict[str, Any]]

SCENARIOS: dict[str, tuple[Scenario, dict[str, float | int], dict[str, Any]]] = {
    # name -> (function, options and their defaults, settings of the engine)
    "prefix": (prefix, {"users": 64, "system-tokens": 1000, "own-tokens": 32, "output-tokens": 16}, {}),
    "rag": (rag_trace, {"requests": 60, "rate": 2.0, "documents": 12, "seed": 0}, {}),
    "longprompt": (longprompt, {"streams": 16, "stream-tokens": 192, "prompt-tokens": 4000, "after": 2.0}, {}),
    "static": (static, {"requests": 128, "batch": 0, "pad-prompts": 1, "seed": 0}, {}),
    "priority": (
        priority,
        {
            "calibrate": 128,
            "requests": 300,
            "urgent-share": 0.2,
            "unloaded": 0.3,
            "overload": 2.0,
            "pacing": 1,
            "max-hurried": scheduling.MAX_HURRIED,
            "seed": 0,
        },
        {"policy": "priority"},
    ),
    "waste": (waste, {"requests": 96, "seed": 0}, {}),
    "structured": (structured, {"concurrency": 16, "output-tokens": 64, "repeat": 3}, {}),
    "overhead": (overhead, {"concurrency": 16, "output-tokens": 64, "repeat": 3}, {}),
}


def add_commands(commands: Any) -> None:
    """One subcommand a scenario."""
    for name, (function, options, _) in SCENARIOS.items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.add_argument("--json", action="store_true", help="one JSON object a line")
        for option, default in options.items():
            command.add_argument(f"--{option}", type=type(default), default=default, help="default: %(default)s")
        add_engine_arguments(command)
        command.set_defaults(run=run, scenario=name)


def run(args: argparse.Namespace) -> None:
    function, _, settings = SCENARIOS[args.scenario]
    with local_engine(args, **settings) as local:
        show({"scenario": args.scenario} | function(local, args), args.json)
