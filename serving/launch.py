"""python -m serving.launch: parse flags, start the engine, listen until told to stop."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import NoReturn

from serving import event_loop, memory
from serving.boot.engine_flags import in_flags
from serving.boot.flags.launch import describe, parse
from serving.engine.api.config import EngineConfig
from serving.metrics.logs import setup_logging
from serving.metrics.tracing import Tracing
from serving.reliability.faults import strike_at_start, wanted
from serving.reliability.supervisor import Supervisor
from serving.server.server import EXIT_FAILED, Server


def main(argv: list[str] | None = None) -> int:
    """Runs the server. Returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args, config = parse(argv)
    if args.supervise:
        setup_logging(args.log_format, args.log_level)
        return Supervisor([sys.executable, "-m", "serving.launch", *(a for a in argv if a != "--supervise")]).run()
    memory.begin_start()
    setup_logging(args.log_format, args.log_level)
    print(describe(args), file=sys.stderr, flush=True)
    strike_at_start(wanted(args.inject_fault))
    if config.coordinator is not None or config.num_processes is not None or config.process_id is not None:
        from serving.boot.follow import run_follower
        from serving.processes.start import place_of

        try:
            place = place_of(config)
        except ValueError as error:
            print(f"error: {in_flags(str(error), vars(args).keys())}", file=sys.stderr)
            return EXIT_FAILED
        if place is not None and place.index > 0:
            return run_follower(config, place, lambda line: print(line, file=sys.stderr, flush=True))
    tracing = None
    if args.otlp_traces_endpoint is not None:
        try:
            tracing = Tracing.to_collector(args.otlp_traces_endpoint)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_FAILED
    try:
        return event_loop.run(_run(args, config, tracing))
    finally:
        if tracing is not None:
            tracing.shutdown()


async def _run(args: argparse.Namespace, config: EngineConfig, tracing: Tracing | None) -> int:
    return await Server(args, config, tracing).run()  # made inside the loop: its events belong to it


def cli() -> NoReturn:
    """The process: runs the server and ends with its status."""
    status = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: that joins threads, and those of a dead engine or an interrupted compilation may never end.
    os._exit(status)


if __name__ == "__main__":
    cli()
