"""Us and other engines on the same work, alternately, with ratios.

A peer is a command that prints the standard rows (as `bench.py throughput --json` does). The words {concurrency},
{prompt_tokens} and {output_tokens} in it are replaced. Peers live outside this repository, in environments of their own:

    --peer "other=/opt/other/bin/python other_bench.py --concurrency {concurrency}"
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from benchmarks.report import machine, pyplot

Rows = dict[str, dict[int, list[float]]]
"""engine -> concurrency -> output tokens a second of each round."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=COMMAND", help="may be given several times"
    )
    parser.add_argument(
        "--ours", action="append", default=[], metavar="NAME=FLAGS", help="variants of us: flags of `throughput`"
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="medians are taken over them")
    parser.add_argument(
        "--quiet",
        type=float,
        metavar="LOAD",
        help="before each run, wait until the machine's 1-minute load is below this",
    )
    parser.add_argument("--plot", metavar="PNG", help="throughput against concurrency (needs matplotlib)")
    parser.add_argument("--save", metavar="FILE", help="write every row and the machine as JSON")


def run(args: argparse.Namespace) -> None:
    facts = machine()
    shape = {"prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens}
    names = " ".join(map(str, args.concurrency))
    commands = {}
    for variant in args.ours or ["jaxserve="]:
        name, _, flags = variant.partition("=")
        script = pathlib.Path(__file__).resolve().parents[1] / "bench.py"
        fixed = f"--concurrency {names} --prompt-tokens {args.prompt_tokens} --output-tokens {args.output_tokens}"
        commands[name] = [sys.executable, str(script), "throughput", "--json", *shlex.split(f"{fixed} {flags}")]
    ours = list(commands)
    for peer in args.peer:
        name, found, template = peer.partition("=")
        if not found:
            raise SystemExit(f"--peer takes NAME=COMMAND, got {peer!r}.")
        commands[name] = shlex.split(template.format(concurrency=names, **shape))
    rows: Rows = defaultdict(lambda: defaultdict(list))
    for _ in range(args.rounds):
        for name, command in commands.items():
            if args.quiet:
                wait_until_quiet(args.quiet)
            load = round(os.getloadavg()[0], 1)
            for row in standard_rows(name, command):
                rows[name][row["concurrency"]].append(row["output_tok_s"])
                print(json.dumps({"peer": name, "load_before": load} | row), file=sys.stderr, flush=True)
    if args.json:
        for name, by_concurrency in rows.items():
            for concurrency, rates in by_concurrency.items():
                print(
                    json.dumps({"engine": name, "concurrency": concurrency, "output_tok_s": statistics.median(rates)})
                )
    else:
        print(table(rows, ours[0]))
    if args.save:
        saved = {"machine": facts, "shape": shape, "rows": {k: dict(v) for k, v in rows.items()}}
        pathlib.Path(args.save).write_text(json.dumps(saved, indent=1) + "\n")
    if args.plot:
        plot(args.plot, rows)


def wait_until_quiet(load: float, limit_s: float = 600.0) -> None:
    """Sleeps until others leave the machine alone, at most `limit_s` seconds."""
    end = time.monotonic() + limit_s
    while os.getloadavg()[0] > load and time.monotonic() < end:
        time.sleep(2)


def standard_rows(name: str, command: list[str]) -> Iterator[dict[str, Any]]:
    """Runs a command and yields the standard rows that it prints.

    Raises:
        SystemExit: it printed none.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"engine"')]
    if not found:
        raise SystemExit(f"{name} printed no result (exit code {done.returncode}):\n{done.stderr[-2000:]}")
    yield from found


def table(rows: Rows, base: str) -> str:
    """Markdown: median tokens a second, and what ours is as a multiple of each."""
    concurrencies = sorted({c for by in rows.values() for c in by})
    lines = ["| engine | " + " | ".join(f"{c}" for c in concurrencies) + " |"]
    lines.append("|---|" + "---|" * len(concurrencies))
    for name, by in rows.items():
        cells = []
        for c in concurrencies:
            if not by.get(c):
                cells.append("-")
                continue
            mine, theirs = statistics.median(rows[base][c]), statistics.median(by[c])
            cells.append(f"{theirs:.0f}" + ("" if name == base else f" ({mine / theirs:.2f}x)"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(path: str, rows: Rows) -> None:
    """Throughput against concurrency, a line an engine."""
    figure, axes = pyplot().subplots(figsize=(7.6, 3.8), dpi=90)
    for name, by in rows.items():
        concurrencies = sorted(by)
        axes.plot(concurrencies, [statistics.median(by[c]) for c in concurrencies], marker="o", label=name)
    axes.set(xlabel="requests at once", ylabel="output tokens a second", xscale="log", ylim=(0, None))
    ticks = sorted({c for by in rows.values() for c in by})
    axes.set_xticks(ticks, [str(c) for c in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(path)
