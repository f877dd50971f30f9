"""What `serving.plan` predicts beside what others published for the same model, chips, mesh, batch and context.

    python scripts/plan_published.py [--anew]

Predictions are kept in docs/plan_published.json; those that are missing there (with --anew, all) are compiled, which needs the
TPU compiler and takes a minute or two each. Prints the table and draws docs/plan_published.png.

The predictions are rooflines of our programs, sending after reading; the published numbers are others' engines on real
chips. How far below the line where both agree a point lies is what latency, launches and schedulers cost on top. A point
above it says that collectives and reading overlapped, or that the other engine reads or sends less.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
KEPT = ROOT / "docs" / "plan_published.json"
CHART = ROOT / "docs" / "plan_published.png"

EXAMPLES = "https://github.com/jax-ml/jax-llm-examples/blob/main/llama3/README.md"
COOKBOOK = "https://github.com/sgl-project/sglang-jax/blob/main/docs/cookbook/autoregressive/"


def _llama_70b(batch: int, context: int, rate_of_one: float) -> dict[str, Any]:
    return {
        "model": "Llama-3.1-70B", "topology": "v5e:4x4", "mesh": "model=16", "quantization": "int8", "batch": batch,
        "context": context, "filled": False, "published": batch * rate_of_one, "from": f"{batch} x {rate_of_one} tok/s",
        "engine": "jax-llm-examples", "source": EXAMPLES,
    }  # fmt: skip


def _v6e(model: str, page: str, batch: int, context: int, milliseconds: float) -> dict[str, Any]:
    return {
        "model": model, "topology": "v6e:2x2", "mesh": "model=4", "quantization": "none", "batch": batch,
        "context": context, "filled": True, "published": batch / milliseconds * 1e3, "from": f"{batch} / {milliseconds} ms",
        "engine": "sglang-jax 0.1.0", "source": COOKBOOK + page,
    }  # fmt: skip


# "Context length" is what was allocated there; how much of it was filled is not said (the kernel reads only that), so the
# prediction is a range, from empty to full. More than 64 requests of 2048 do not fit our plan, which repeats KV heads.
PUBLISHED = [
    _llama_70b(8, 2048, 159.0),
    _llama_70b(8, 8192, 146.0),
    _llama_70b(16, 2048, 135.0),
    _llama_70b(32, 2048, 108.0),
    _llama_70b(64, 2048, 68.7),
    # Decoding alone: tokens between the first and the last, over the mean time between two of one request. Contexts are
    # the mean prompt and half the completion: 265 + 129 of the 512 at most that were drawn, and 1024 + 512.
    _v6e("Llama-3.1-8B", "Llama/Llama3.1.md", 16, 394, 9.94),
    _v6e("Qwen3-8B", "Qwen/Qwen3.md", 64, 1536, 11.11),
    _v6e("Qwen3-32B", "Qwen/Qwen3.md", 16, 1536, 16.89),
    _v6e("Qwen3-32B", "Qwen/Qwen3.md", 64, 1536, 29.48),
]


def predict(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what `serving.plan` says: tokens a second, and what of the step is reading and what is sending."""
    from serving.plan.__main__ import main

    arguments = [
        "--model", row["model"], "--topology", row["topology"], "--mesh", row["mesh"], "--quantization",
        row["quantization"], "--max-num-seqs", str(row["batch"]), "--max-num-batched-tokens", "1024", "--context",
        str(row["context"]), "--max-model-len", str(max(2048, 2 * row["context"])), "--decode-only", "--json",
    ]  # fmt: skip
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = main(arguments)
    if status:
        raise SystemExit(f"serving.plan {' '.join(arguments)} ended with {status}")
    plan = json.loads(out.getvalue())
    if plan["max_concurrent_requests"] != row["batch"]:
        raise SystemExit(f"{row['model']}: only {plan['max_concurrent_requests']} of {row['batch']} requests fit")
    forward, sample = plan["programs"][:2]
    return row | {
        "predicted": plan["decode_tokens_per_second"],
        "read_ms": (forward["memory_seconds"] + sample["memory_seconds"]) * 1e3,
        "sent_ms": (forward["links_seconds"] + sample["links_seconds"]) * 1e3,
        "context_ms": forward["memory_seconds"]
        * 1e3
        * forward["context_bytes"]
        / (forward["context_bytes"] + forward["weight_bytes"]),
    }


def most(row: dict[str, Any]) -> float:
    """Tokens a second if no context was read, where it is not known how much was."""
    if row["filled"]:
        return row["predicted"]
    return row["batch"] / (row["batch"] / row["predicted"] - row["context_ms"] / 1e3)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model, mesh | requests x context | published tokens/s | engine | predicted | published of it | reads ms | sends ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"{row['model']}{', int8' if row['quantization'] == 'int8' else ''} on {row['topology']}, {row['mesh']}"
        predicted, share = f"{row['predicted']:,.0f}", f"{row['published'] / row['predicted']:.0%}"
        if not row["filled"]:
            predicted += f" to {most(row):,.0f}"
            share = f"{row['published'] / most(row):.0%} to {share}"
        lines.append(
            f"| {name} | {row['batch']} x {row['context']} | {row['published']:,.0f} ({row['from']}) "
            f"| [{row['engine']}]({row['source']}) | {predicted} | {share} | {row['read_ms']:.2f} | {row['sent_ms']:.2f} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Published over predicted, both logarithmic, with the line where they agree and that at half."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5.5))
    models = dict.fromkeys((row["model"], row["topology"]) for row in rows)
    for number, (model, topology) in enumerate(models):
        own = [row for row in rows if (row["model"], row["topology"]) == (model, topology)]
        label = f"{model}, {topology}" + ("" if own[0]["filled"] else " (context: full to empty)")
        for row in own:
            axes.plot(
                [row["predicted"], most(row)], [row["published"]] * 2, color=f"C{number}", marker="o", label=label
            )
            label = None
            axes.annotate(
                f"{row['batch']} x {row['context']}", (row["predicted"], row["published"]), xytext=(6, -10),
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
    values = [value for row in rows for value in (row["predicted"], most(row), row["published"])]
    ends = [0.8 * min(values), 1.25 * max(values)]
    axes.plot(ends, ends, color="black", linewidth=1, label="as predicted")
    axes.plot(ends, [end / 2 for end in ends], color="gray", linewidth=1, linestyle="--", label="half")
    axes.set(
        xscale="log", yscale="log", xlabel="predicted decode tokens/s (roofline)", ylabel="published decode tokens/s"
    )
    axes.set_title("serving.plan against published numbers (requests x context)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def key(row: dict[str, Any]) -> str:
    """What a row was measured on."""
    return f"{row['model']} {row['topology']} {row['mesh']} {row['quantization']} {row['batch']} x {row['context']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anew", action="store_true", help="predict again what was predicted before")
    args = parser.parse_args()
    kept = {key(row): row for row in json.loads(KEPT.read_text())} if KEPT.exists() and not args.anew else {}
    for row in PUBLISHED:
        if key(row) not in kept:
            kept[key(row)] = predict(row)
            print(f"{key(row)}: {kept[key(row)]['predicted']:,.0f} tokens/s", file=sys.stderr, flush=True)
            KEPT.write_text(json.dumps(list(kept.values()), indent=1) + "\n")  # minutes of compilation are not lost
    rows = [kept[key(row)] | row for row in PUBLISHED]
    print(table(rows))
    draw(rows, CHART)


if __name__ == "__main__":
    main()
