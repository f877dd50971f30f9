"""How much faster experts are when only the chosen ones are computed: against computing every expert densely.

python scripts/bench_experts.py --experts 32 --chosen 4 --width 1024 --ffw 768

For each batch size: milliseconds of every expert as one dense product, of the chosen ones, and of the chosen ones in int8;
and the speed-up over dense beside what the routing allows: all experts over those that a batch's tokens chose between them
(a batch reads each of those once), or of the arithmetic, whichever is less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from ops.experts import can_pack, experts, pack_experts
from ops.linear import quantize


def gate(gate_up: jax.Array) -> jax.Array:
    """silu(gate) * up."""
    first, second = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(first) * second


def dense(
    x_TD: jax.Array, ids_Tk: jax.Array, weights_Tk: jax.Array, up_EJD: jax.Array, down_EDF: jax.Array
) -> jax.Array:
    """Every expert on every token, most of it weighted with zero."""
    E = up_EJD.shape[0]
    share_TE = jnp.zeros((x_TD.shape[0], E)).at[jnp.arange(x_TD.shape[0])[:, None], ids_Tk].add(weights_Tk)
    # The layout in which XLA:CPU is fastest: weights first, rows as columns.
    hidden_EJT = jnp.einsum("ejd,td->ejt", up_EJD, x_TD)
    y_EDT = jnp.einsum("edf,eft->edt", down_EDF, gate(hidden_EJT.swapaxes(1, 2)).swapaxes(1, 2))
    return jnp.einsum("edt,te->td", y_EDT, share_TE)


def milliseconds(fn: Callable[..., Any], *args: Any, seconds: float = 1.0) -> float:
    """The median of as many runs as fit."""
    fn(*args).block_until_ready()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        began = time.perf_counter()
        fn(*args).block_until_ready()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--chosen", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--ffw", type=int, default=768)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=0.7, help="of each measurement")
    a = parser.parse_args()
    E, k, D, F = a.experts, a.chosen, a.width, a.ffw
    rng = np.random.default_rng(0)
    up, down = (jnp.asarray(rng.standard_normal(s, np.float32) * 0.02) for s in ((E, 2 * F, D), (E, D, F)))
    packed = [pack_experts(quantize(w, "int8")) for w in (up, down)] if can_pack(up.shape, "silu") else None
    chosen = jax.jit(lambda *args: experts(*args, gate, gated="silu"))
    print(f"{E} experts of {D} x {F}, {k} a token, float32 ({(up.nbytes + down.nbytes) / 1e6:.0f} MB) and int8\n")
    print("| batch | experts touched | dense ms | chosen ms | speed-up | possible | int8 ms | over dense |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for T in a.batches:
        x = jnp.asarray(rng.standard_normal((T, D), np.float32))
        ids = np.stack([rng.choice(E, k, replace=False) for _ in range(T)]).astype(np.int32)
        weights = np.full((T, k), 1 / k, np.float32)
        touched = len(np.unique(ids))
        every = milliseconds(jax.jit(dense), x, ids, weights, up, down, seconds=a.seconds)
        some = milliseconds(chosen, x, ids, weights, up, down, seconds=a.seconds)
        cells = [T, touched, f"{every:.2f}", f"{some:.2f}", f"{every / some:.1f}", f"{max(E / touched, 1):.1f}"]
        if T * k > touched:  # rows share experts: arithmetic may be what bounds it
            cells[-1] += f" to {E / k:.1f}"
        if packed is not None:
            fast = milliseconds(chosen, x, ids, weights, *packed, seconds=a.seconds)
            cells += [f"{fast:.2f}", f"{every / fast:.1f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
