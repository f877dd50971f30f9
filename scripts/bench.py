#!/usr/bin/env python3
"""Benchmarks. Each prints what a person reads, or with --json one JSON line a result.

    python scripts/bench.py throughput --concurrency 1 16 64 --prompt-tokens 128 --output-tokens 64 --json
    python scripts/bench.py startup
    python scripts/bench.py serve --rate 4 --requests 200                 # a running server, over gRPC
    python scripts/bench.py peers --peer "name=command {concurrency}"     # us and others, alternately
    python scripts/bench.py prefix | rag | longprompt | static | priority | structured | waste | overhead | predict
    python scripts/bench.py host | frontends                              # what the host costs a step

Absolute figures depend on the machine and on what else it does: compare within one run.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import frontends, host, peers, predict, scenarios, serve, startup, throughput

COMMANDS = {
    "throughput": throughput,
    "startup": startup,
    "serve": serve,
    "peers": peers,
    "host": host,
    "frontends": frontends,
    "predict": predict,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        command.add_argument("--json", action="store_true", help="one JSON object a line")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    scenarios.add_commands(commands)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
