"""jaxserve run FILE.jsonl: a file of requests without a server, results beside it."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence


def main(argv: Sequence[str], word: str = "run") -> int:
    """Runs the file. Returns the exit status of `serving.batch`."""
    parser = argparse.ArgumentParser(
        prog="jaxserve run",
        description="Runs OpenAI's batch file without a server; further flags are those of `jaxserve batch --help`.",
    )
    parser.add_argument("file", type=pathlib.Path, help="requests, one JSON object a line")
    parser.add_argument("-o", "--output", type=pathlib.Path, help="results (default: FILE.results.jsonl beside it)")
    args, rest = parser.parse_known_args(argv)
    from serving.batch import main as run_batch

    output = args.output or args.file.with_name(f"{args.file.stem}.results.jsonl")
    return run_batch(["-i", str(args.file), "-o", str(output), *rest])
