"""Output tokens a second on the standard workload: equal prompts, greedy, all at once, nothing shared."""

from __future__ import annotations

import argparse

from benchmarks.driving import span
from benchmarks.local import StepRecorder, add_engine_arguments, local_engine
from benchmarks.report import show, standard_row
from benchmarks.work import standard_prompts, uniform
from serving.simulator.cost import write_records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=1, help="rows of each concurrency")
    parser.add_argument(
        "--record", metavar="FILE", help="write each step's shape and seconds, for scripts/simulate.py --fit"
    )
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> None:
    with local_engine(args, enable_prefix_caching=False) as local, StepRecorder(local) as recorder:
        for concurrency in args.concurrency:
            prompts = standard_prompts(concurrency, args.prompt_tokens)
            for _ in range(args.repeat):
                # Whole completions, as `LLM.generate` and the peers' calls give them.
                outcomes = local.run(uniform(concurrency, args.prompt_tokens, args.output_tokens), prompts, whole=True)
                made = sum(o.output_tokens for o in outcomes)
                if made != concurrency * args.output_tokens:
                    raise SystemExit(
                        f"{made} tokens came back of {concurrency * args.output_tokens}: {outcomes[0].reason}"
                    )
                show(
                    standard_row("jaxserve", concurrency, args.output_tokens, span(outcomes), local.startup_s),
                    args.json,
                )
        if args.record:
            write_records(args.record, recorder.records)
