"""Times each matmul shape of a model in each way it can be stored, against this machine's measured peak.

    python scripts/roofline.py [--shapes 960x576 3072x576 ...] [--rows 1 16 64 1024] [--ways native xla-int8 ...] [--json]

For each shape, number of rows and way it prints the time, the rate, the rate over the peak of the same kind, the bytes
of weights read a second, and what became of the dot in the compiled program. The peak is the best rate that anything
measured reached with the same operand type, or with --peak what is given. On a shared machine a thread is often
interrupted: each number is the best of many runs, and runs of over some milliseconds still look slower than they are.

With --load N it also says how many tokens a second N requests of the standard load could make of the default model at these
rates (`limit`): what any engine that keeps its weights in int8 must do, and nothing else.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from bench_attention import bandwidth_probe
from jax import lax

from ops import native
from ops.linear import Int8Weight, linear, pack, quantize

SMOLLM2_135M = ("960x576", "576x576", "3072x576", "576x1536", "49152x576")


def dense(dtype: Any) -> Callable[[jax.Array], tuple[Any, Callable]]:
    """As models store it: [out, in]."""
    return lambda weight_OI: (weight_OI.astype(dtype), linear)


def transposed(dtype: Any) -> Callable[[jax.Array], tuple[Any, Callable]]:
    """[in, out]: for comparison."""

    def product(x_TI: jax.Array, weight_IO: jax.Array) -> jax.Array:
        contract = (((1,), (0,)), ((), ()))
        return lax.dot_general(x_TI.astype(weight_IO.dtype), weight_IO, contract, preferred_element_type=jnp.float32)

    return lambda weight_OI: (jnp.array(weight_OI.T.astype(dtype)), product)


def native_int8(weight_OI: jax.Array) -> tuple[Any, Callable]:
    weight = pack(quantize(weight_OI, "int8"))
    if isinstance(weight, Int8Weight):
        raise SystemExit(f"native-int8 cannot run: {native.status()}")
    return weight, linear


WAYS: dict[str, Callable[[jax.Array], tuple[Any, Callable]]] = {
    "f32": dense(jnp.float32),
    "f32-transposed": transposed(jnp.float32),
    "bf16": dense(jnp.bfloat16),
    "bf16-transposed": transposed(jnp.bfloat16),
    "xla-int8": lambda weight_OI: (quantize(weight_OI, "int8"), linear),
    "native-int8": native_int8,
}


def best_time(run: Callable[[], jax.Array], seconds: float) -> float:
    """The shortest of as many runs as fit, in seconds; three at least."""
    jax.block_until_ready(run())
    best, end, runs = float("inf"), time.perf_counter() + seconds, 0
    while runs < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(run())
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best


def became(compiled: Any) -> str:
    """The instructions of an optimized program that do a product's work, counted: dot, custom-call target, fusion."""
    text = compiled.as_text()
    found = collections.Counter(
        match[1] or match[0]
        for match in re.findall(r'= \S+ (dot|custom-call|fusion|convert)\((?:.*custom_call_target="([^"]+)")?', text)
    )
    names = {name: re.sub(r"\.[0-9a-f]{16}$", "", name) for name in found}
    return ", ".join(f"{count} {names[name]}" for name, count in sorted(found.items()))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record a shape, way and number of rows."""
    records = []
    for shape in args.shapes:
        O, I = map(int, shape.split("x"))
        weight_OI = jax.random.normal(jax.random.key(0), (O, I), jnp.float32) * I**-0.5
        for way in args.ways:
            weight, product = WAYS[way](weight_OI)
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
            for rows in args.rows:
                x_TI = jax.random.normal(jax.random.key(1), (rows, I), jnp.float32)
                compiled = jax.jit(product).lower(x_TI, weight).compile()
                seconds = best_time(lambda c=compiled, x=x_TI, w=weight: c(x, w), args.seconds)
                record = {
                    "shape": shape,
                    "way": way,
                    "rows": rows,
                    "us": round(seconds * 1e6, 1),
                    "gops": round(2 * O * I * rows / seconds / 1e9, 1),
                    "weight_gb_s": round(size / seconds / 1e9, 1),
                    "became": became(compiled),
                }
                records.append(record)
    return records


def add_peaks(records: list[dict[str, Any]], given: float | None) -> None:
    """Adds `of_peak`: the rate over the best of the same operand type."""
    for record in records:
        kind = _kind(record["way"])
        rates = [r["gops"] for r in records if _kind(r["way"]) == kind]
        peak = given or max(rates, default=0.0)
        record["of_peak"] = round(record["gops"] / peak, 2) if peak else None


def _kind(way: str) -> str:
    return "int8" if "int8" in way else way.split("-")[0]


LAYERS, HEADS, KV_HEADS, HEAD_DIM = 30, 9, 3, 64  # SmolLM2-135M's


def limit(requests: int, prompt: int, output: int, int8: float, bfloat16: float, bandwidth: float) -> dict[str, float]:
    """Seconds that so many requests, all at once, take at least on a machine of these rates, by what they go to.

    Every token goes through all layers' products, but that of a prompt the last layer needs K and V and one token's rest; every
    sampled one goes through the head's; steps of few rows read the weights from
    memory instead, where that takes longer. A prompt's attention is bound by products in bfloat16, a decode step's by reading
    bfloat16 K and V. No engine overlaps the two: what a layer attends to comes from its own products. Norms, rounding, sampling and
    the host's work are left out, for nobody says how little they could be.

    Args:
        int8, bfloat16: operations a second.
        bandwidth: bytes a second.
    """
    *layer, head = (int(shape.split("x")[0]) * int(shape.split("x")[1]) for shape in SMOLLM2_135M)
    layers, kv_bytes = LAYERS * sum(layer), LAYERS * KV_HEADS * HEAD_DIM * 2 * 2
    width = int(SMOLLM2_135M[0].split("x")[1])
    kept = layers - sum(layer) + 2 * KV_HEADS * HEAD_DIM * width  # of a token that nobody reads
    steps, contexts = output - 1, sum(prompt + made for made in range(1, output))
    step = max(2 * requests * (layers + head) / int8, (layers + head) / bandwidth)
    pairs = prompt * (prompt + 1) / 2 * (LAYERS - 1) + prompt
    return {
        "products of prompts": 2 * requests * ((prompt - 1) * kept + layers + head) / int8,
        "products of decode steps": steps * step,
        "attention of prompts": 4 * requests * pairs * HEADS * HEAD_DIM / bfloat16,
        "attention of decode steps": requests * contexts * kv_bytes / bandwidth,
    }


def show_limits(requests: list[int], prompt: int, output: int, records: list[dict[str, Any]]) -> None:
    """Prints `limit` of each number of requests at the rates that were measured."""
    best = {
        kind: max((r["gops"] for r in records if _kind(r["way"]) == kind), default=0.0) for kind in ("int8", "bf16")
    }
    if not all(best.values()):
        raise SystemExit("--load wants int8 and bf16 among --ways")
    probe = bandwidth_probe()
    bandwidth = max(probe() for _ in range(20))
    print(f"int8 {best['int8']:.0f} GOP/s, bfloat16 {best['bf16']:.0f}, memory {bandwidth / 1e9:.1f} GB/s")
    for count in requests:
        parts = limit(count, prompt, output, best["int8"] * 1e9, best["bf16"] * 1e9, bandwidth)
        products = sum(seconds for name, seconds in parts.items() if "products" in name)
        made, words = count * output, ", ".join(f"{name} {seconds:.3f} s" for name, seconds in parts.items())
        print(
            f"{count} requests, {prompt} in, {output} out: {made / sum(parts.values()):.0f} tokens/s ({words}); "
            f"with products alone {made / products:.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SMOLLM2_135M), help="OUTxIN; SmolLM2-135M's by default")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 256], help="numbers of rows")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="how the weight is stored")
    parser.add_argument("--seconds", type=float, default=0.3, help="spent on each measurement")
    parser.add_argument("--peak", type=float, help="GOP/s to compare with, instead of the best measured")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--load", nargs="+", type=int, default=[], help="requests at once whose limit is told")
    parser.add_argument("--tokens", nargs=2, type=int, default=[128, 64], help="in and out, of --load")
    args = parser.parse_args()
    records = measure(args)
    add_peaks(records, args.peak)
    if args.json:
        for record in records:
            print(json.dumps(record))
        return
    print(f"{native.status()}; {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{'shape':>12} {'way':<16} {'rows':>5} {'µs':>10} {'GOP/s':>8} {'of peak':>8} {'GB/s':>6}  became")
    for r in records:
        share = "" if r["of_peak"] is None else f"{r['of_peak']:.0%}"
        line = f"{r['shape']:>12} {r['way']:<16} {r['rows']:>5} {r['us']:>10} {r['gops']:>8} {share:>8}"
        print(f"{line} {r['weight_gb_s']:>6}  {r['became']}")
    if args.load:
        prompt, output = args.tokens
        show_limits(args.load, prompt, output, records)


if __name__ == "__main__":
    main()
