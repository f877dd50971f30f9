"""Measures kernels, a decode step and the engine on a GPU, and writes docs/benchmarks/gpu.md.

    python scripts/bench_gpu.py [--out FOLDER] [--only ceilings decode prefill step engine] [--backend xla]
    python scripts/bench_gpu.py --only tune  which sizes of the kernels' programs are fastest here
    python scripts/bench_gpu.py --smoke      tiny sizes, kernels interpreted: whether it all runs, on any machine

Needs a GPU, jax with CUDA and this checkout; `engine` needs what serving needs, and transformers with torch to compare
with. Weights are random and of real shapes: nothing is downloaded. Every number is the median of several runs after a
warm-up; percentages are of what this very device gave in `ceilings`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

SECTIONS = ("ceilings", "decode", "prefill", "step", "engine")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=ROOT / "docs" / "benchmarks", help="where gpu.md and gpu.json go"
    )
    parser.add_argument("--only", nargs="+", choices=(*SECTIONS, "tune"), default=SECTIONS)
    parser.add_argument("--backend", help="of attention, instead of the first that fits")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--smoke", action="store_true")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    found: dict[str, Any] = {}
    if "engine" in args.only:  # first, while this process holds no device memory
        from benchmarks.gpu_engine import compare

        sizes = [(3, 16, 8)] if args.smoke else [(1, 128, 256), (16, 512, 256), (64, 512, 256)]
        found["engine"] = [compare(*size, smoke=args.smoke, limit_s=240) for size in sizes]
    import jax
    from benchmarks import gpu_ops

    from ops import paged_attention

    device = jax.devices()[0]
    if device.platform != "gpu" and not args.smoke:
        print(f"error: the device is a {device.platform}; this measures GPUs (--smoke runs anywhere)", file=sys.stderr)
        return 2
    found |= {"device": device.device_kind, "jax": jax.__version__, "when": time.strftime("%Y-%m-%d", time.gmtime())}
    backend = args.backend or ("pallas_gpu" if args.smoke else None)
    runs, repeats = (1, 1) if args.smoke else (args.runs, 10)
    limits = gpu_ops.ceilings(1 << 20, 128, runs) if args.smoke else gpu_ops.ceilings(4 << 30, 8192, args.runs)
    found["ceilings"] = {"bandwidth": limits.bandwidth, "flops": limits.flops}
    activations = "float32" if args.smoke else "bfloat16"
    with paged_attention.use_backend(backend) if backend else contextlib.nullcontext():
        for section, cases in (("decode", gpu_ops.decode_cases), ("prefill", gpu_ops.prefill_cases)):
            if section in args.only:
                found[section] = [
                    _measured(lambda c=c: gpu_ops.attention(*c, activations, repeats, runs), c[0], limits)
                    for c in cases(args.smoke)
                ]
        if "tune" in args.only:
            found["tune"] = _tune(gpu_ops, limits, args.smoke, activations, repeats, runs)
        if "step" in args.only:
            found["step"] = [
                _step(gpu_ops, size, limits, args.smoke, repeats, runs) for size in _step_sizes(args.smoke)
            ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    text = to_markdown(found)
    (args.out / "gpu.md").write_text(text)
    print(text)
    return 0


def _measured(run: Any, name: str, limits: Any) -> dict[str, Any]:
    """A row; a case that fails is a row that says so, so that the others are not lost with it."""
    try:
        row = run()
    except Exception as e:
        return {"name": name, "error": f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"}
    return {
        "name": row.name,
        "seconds": row.seconds,
        "bandwidth_share": row.bytes / row.seconds / limits.bandwidth,
        "flops_share": row.flops / row.seconds / limits.flops,
    }


def _tune(
    gpu_ops: Any, limits: Any, smoke: bool, activations: str, repeats: int, runs: int
) -> dict[str, list[dict[str, Any]]]:
    """Every tuning of the second decode and the first prefill case, best first."""
    chosen = {"decode": gpu_ops.decode_cases(smoke)[1], "prefill": gpu_ops.prefill_cases(smoke)[0]}
    found = {}
    for section, (name, case, dtype) in chosen.items():
        rows = [
            _measured(
                lambda t=t, c=case, d=dtype: gpu_ops.with_tuning(t, c, d, activations, repeats, runs), str(t), limits
            )
            for t in gpu_ops.tunings(smoke, section == "prefill")
        ]
        found[f"{section} {name}"] = sorted(rows, key=lambda row: row.get("seconds", float("inf")))
    return found


def _step_sizes(smoke: bool) -> list[tuple[int, int, str]]:
    if smoke:
        return [(2, 40, "float32")]
    return [
        (1, 1024, "bfloat16"),
        (64, 1024, "bfloat16"),
        (256, 1024, "bfloat16"),
        (64, 8192, "bfloat16"),
        (64, 8192, "int8"),
    ]


def _step(
    gpu_ops: Any, size: tuple[int, int, str], limits: Any, smoke: bool, repeats: int, runs: int
) -> dict[str, Any]:
    requests, context, kv_dtype = size
    model = gpu_ops.Llama(64, 96, 2, 4, 2, 16, 256) if smoke else gpu_ops.Llama()
    name = f"{requests} x {context}, {kv_dtype} pages"
    try:
        took, read = gpu_ops.decode_step(model, *size, "float32" if smoke else "bfloat16", repeats, runs)
    except Exception as e:
        return {"name": name, "error": f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"}
    floor = read / limits.bandwidth
    return {"name": name, "seconds": took, "floor": floor, "share": floor / took, "tokens_per_second": requests / took}


def to_markdown(found: dict[str, Any]) -> str:
    """The page for docs/benchmarks."""
    limits = found["ceilings"]
    lines = [
        f"# On a GPU: {found['device']}",
        "",
        f"Measured {found['when']} with jax {found['jax']} by `python scripts/bench_gpu.py`; the numbers are in `gpu.json`.",
        "",
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
                else f"| {row['name']} | {row['seconds'] * 1e3:.3f} | {row[share]:.0%} |"
                for row in found[section]
            ]
    for title, rows in found.get("tune", {}).items():
        lines += ["", f"## Tunings: {title}", "", "| sizes | ms |", "|---|---|"]
        lines += [f"| {row['name']} | {row.get('error') or format(row['seconds'] * 1e3, '.3f')} |" for row in rows]
    if "step" in found:
        lines += [
            "", "## Decode step of Llama-3.1-8B, random weights in bfloat16", "",
            "The floor is the time to read weights and KV once. Wanted: 70 % of it.", "",
            "| requests x context | ms | floor ms | of the floor | tokens/s |", "|---|---|---|---|---|",
        ]  # fmt: skip
        lines += [
            f"| {row['name']} | {row['error']} | | | |"
            if "error" in row
            else f"| {row['name']} | {row['seconds'] * 1e3:.2f} | {row['floor'] * 1e3:.2f} | {row['share']:.0%} "
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
    return "\n".join(lines) + "\n"


def _rate(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, float) else str(value or "")


if __name__ == "__main__":
    sys.exit(main())
