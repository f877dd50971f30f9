"""Measures kernels, a decode step and the engine on a GPU, and writes docs/benchmarks/gpu.md.

    python scripts/bench_gpu.py [--out FOLDER] [--only decode prefill step engine] [--backend xla] [--limit 540]
    python scripts/bench_gpu.py --only tune  which sizes of the kernels' programs are fastest here
    python scripts/bench_gpu.py --smoke      tiny sizes, kernels interpreted: whether it all runs, on any machine

Needs a GPU, jax with CUDA and this checkout; `engine` needs what serving needs, and transformers with torch to compare
with. Weights are random and of real shapes: nothing is downloaded. Every number is the median of several runs after a
warm-up; percentages are of what this very device gave in `ceilings`, which every call measures anew.

Each part runs in a process of its own and has a time limit; both files are written after every row. A later call with other
parts adds to what is there, as long as device and jax are the same.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from benchmarks import gpu_parts  # noqa: E402

DEFAULT = ("decode", "prefill", "step", "engine")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=ROOT / "docs" / "benchmarks", help="where gpu.md and gpu.json go"
    )
    parser.add_argument("--only", nargs="+", choices=gpu_parts.PARTS, default=DEFAULT)
    parser.add_argument("--backend", help="of attention, instead of the first that fits")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--limit", type=float, default=540, metavar="S", help="seconds that a part may take")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--part", choices=gpu_parts.PARTS, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.part:
        gpu_parts.print_rows(args.part, args.smoke, args.backend, args.runs)
        return 0
    command = [sys.executable, __file__, "--runs", str(args.runs), *(["--smoke"] if args.smoke else [])]
    command += ["--backend", args.backend] if args.backend else []
    about: dict[str, Any] = {}
    failed = gpu_parts.run([*command, "--part", "ceilings"], args.limit, about.update)
    if "platform" not in about:
        print(f"error: no device: {failed}", file=sys.stderr)
        return 2
    if about["platform"] != "gpu" and not args.smoke:
        print(
            f"error: the device is a {about['platform']}; this measures GPUs (--smoke runs anywhere)", file=sys.stderr
        )
        return 2
    found = _before(args.out, about) | {"when": time.strftime("%Y-%m-%d", time.gmtime())}
    found["ceilings"] = {name: about.get(name) for name in ("bandwidth", "flops")}
    found["failed"] = {part: why for part, why in found.get("failed", {}).items() if part not in args.only}
    _note_failure(found, "ceilings", failed)
    _write(args.out, found)
    for part in [part for part in gpu_parts.PARTS[1:] if part in args.only]:
        found[part] = {} if part == "tune" else []

        def take(row: dict[str, Any], part: str = part) -> None:
            print(f"{part}: {json.dumps(row)}", file=sys.stderr, flush=True)
            rows = found["tune"].setdefault(row.pop("group"), []) if part == "tune" else found[part]
            rows.append(_with_shares(row, found["ceilings"]))
            _write(args.out, found)

        _note_failure(found, part, gpu_parts.run([*command, "--part", part], args.limit, take))
        _write(args.out, found)
    print((args.out / "gpu.md").read_text(), end="")
    return 1 if found["failed"] else 0


def _before(folder: pathlib.Path, about: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call found with the same device and jax."""
    same = {name: about[name] for name in ("device", "platform", "jax")}
    try:
        found = json.loads((folder / "gpu.json").read_text())
    except (OSError, ValueError):
        return same
    return found if found.items() >= same.items() else same


def _note_failure(found: dict[str, Any], part: str, why: str | None) -> None:
    if why is not None:
        found["failed"][part] = why


def _with_shares(row: dict[str, Any], ceilings: dict[str, float | None]) -> dict[str, Any]:
    """The row with what it got of the device's bandwidth and products, where both are known."""
    for share, amount, most in (("bandwidth_share", "bytes", "bandwidth"), ("flops_share", "flops", "flops")):
        limit = ceilings[most]
        if amount in row and limit:
            row[share] = row[amount] / row["seconds"] / limit
    return row


def _write(folder: pathlib.Path, found: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "gpu.md").write_text(to_markdown(found))


def to_markdown(found: dict[str, Any]) -> str:
    """The page for docs/benchmarks."""
    limits = found["ceilings"]
    lines = [
        f"# On a GPU: {found['device']}",
        "",
        f"Measured {found['when']} with jax {found['jax']} by `python scripts/bench_gpu.py`; the numbers are in `gpu.json`.",
        "",
    ]
    if limits["bandwidth"] and limits["flops"]:
        lines += [
            f"Memory gives {limits['bandwidth'] / 1e12:.2f} TB/s, a bfloat16 product of 8192 x 8192 x 8192 "
            f"{limits['flops'] / 1e12:.0f} TFLOP/s. Percentages are of these.",
        ]
    titles = {
        "decode": ("Decode attention, one layer", "of bandwidth", "bandwidth_share", 0.8),
        "prefill": ("Prefill attention, one layer", "of the product's rate", "flops_share", 0.5),
    }
    for section, (title, label, share, wanted) in titles.items():
        if section in found:
            lines += [
                "",
                f"## {title}",
                "",
                f"Wanted: {wanted:.0%} {label}.",
                "",
                f"| case | ms | {label} |",
                "|---|---|---|",
            ]
            lines += [
                f"| {row['name']} | {row['error']} | |"
                if "error" in row
                else f"| {row['name']} | {row['seconds'] * 1e3:.3f} | {_percent(row.get(share))} |"
                for row in found[section]
            ]
    for title, rows in found.get("tune", {}).items():
        lines += ["", f"## Tunings: {title}", "", "| (rows, keys, warps, stages) | ms |", "|---|---|"]
        rows = sorted(rows, key=lambda row: row.get("seconds", float("inf")))
        lines += [f"| {row['name']} | {row.get('error') or format(row['seconds'] * 1e3, '.3f')} |" for row in rows]
    if "step" in found:
        lines += [
            "", "## Decode step of Llama-3.1-8B, random weights in bfloat16", "",
            "The floor is the time to read weights and KV once. Wanted: 70 % of it.", "",
            "| requests x context | ms | of the floor | tokens/s |", "|---|---|---|---|",
        ]  # fmt: skip
        lines += [
            f"| {row['name']} | {row['error']} | | |"
            if "error" in row
            else f"| {row['name']} | {row['seconds'] * 1e3:.2f} | {_percent(row.get('bandwidth_share'))} "
            f"| {row['tokens_per_second']:,.0f} |"
            for row in found["step"]
        ]
    if "engine" in found:
        lines += [
            "", "## The engine against transformers", "",
            "A Llama of 1.2 billion random bfloat16 weights, greedy, all requests at once; output tokens a second, second run.",
            "", "| requests | prompt | output | jaxserve | transformers |", "|---|---|---|---|---|",
        ]  # fmt: skip
        lines += [
            f"| {row.get('requests', '')} | {row.get('prompt', '')} | {row.get('output', '')} "
            f"| {_rate(row.get('ours'))} | {_rate(row.get('transformers'))} |"
            for row in found["engine"]
        ]
    for part, why in found["failed"].items():
        lines += ["", f"The part `{part}` did not come to its end: {why}."]
    return "\n".join(lines) + "\n"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _rate(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, float) else str(value or "")


if __name__ == "__main__":
    sys.exit(main())
