"""Times paged attention's bodies on this machine against the bytes or products they cannot avoid.

    python scripts/bench_attention.py [--backend xla native] [--dtype float32 bfloat16 int8] [--case "decode 64"]

Each case runs over as many layers as it takes to leave the caches behind, as a model does, and reports the time of one
layer (lower quartile; wall clock and all threads' CPU), the K and V bytes it reads a second beside what memory gave
between the runs, and the products it does a second, by wall clock and by CPU second. Bodies run in alternation.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from ops import paged_attention
from ops.buffers import Lasting
from ops.paged_attention.cases import BENCH_CASES, Case, make_arguments

ENOUGH_BYTES = 256 << 20  # pages of all layers together: eight times a 32 MiB last-level cache


def bandwidth_probe():
    """A function that reads 256 MiB with all cores and returns bytes a second. They lie in huge pages where there are some, as
    weights and KV pages do: memory gives half as much in small ones."""
    ones = Lasting().empty((1 << 26,), np.float32)
    ones[:] = 1
    x = jax.device_put(ones, may_alias=True)
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()

    def probe() -> float:
        start = time.perf_counter()
        total(x).block_until_ready()
        return x.nbytes / (time.perf_counter() - start)

    return probe


def work(case: Case, dtype: np.dtype) -> tuple[float, float]:
    """(bytes of K and V that a step must read, floating-point operations it must do)."""
    spec = case.spec
    token_bytes = paged_attention.bytes_per_page(spec, 1, dtype)
    keys = sum(min(n, case.window or n) for n in case.decode)
    pairs = keys
    for before, new in case.chunks:
        keys += before + new
        pairs += sum(min(before + j + 1, case.window or before + j + 1) for j in range(new))
    flops = 2.0 * pairs * case.num_kv_heads * case.group * (spec.head_dim + (spec.v_head_dim or spec.head_dim))
    return float(keys * token_bytes), flops


def random_like(rng: np.random.Generator, leaf: jax.Array) -> jax.Array:
    """Pages of random numbers, without the detour of writing them token by token."""
    if leaf.dtype == jnp.int8:
        return jnp.asarray(rng.integers(-127, 128, leaf.shape, np.int8))
    return jnp.asarray(rng.random(leaf.shape, np.float32) - 0.5, leaf.dtype)


def prepare(case: Case, backend: str, dtype: np.dtype):
    """A function that runs one step over all layers and the number of layers."""
    arguments = make_arguments(case, leftovers=0.0)
    num_pages = arguments.history_k.shape[0]
    bytes_a_layer = num_pages * paged_attention.bytes_per_page(case.spec, case.page_size, dtype)
    layers = max(2, min(30, -(-ENOUGH_BYTES // bytes_a_layer)))
    options = {name: value for name, value in arguments.options.items() if name != "sinks_KG"}
    with paged_attention.use_backend(backend):
        kv = paged_attention.allocate(case.spec, num_pages, case.page_size, dtype)
        kv = jax.tree.map(functools.partial(random_like, np.random.default_rng(0)), kv)
        kvs = [kv, *(jax.tree.map(jnp.copy, kv) for _ in range(layers - 1))]

        @functools.partial(jax.jit, donate_argnums=3)
        def step(q, k, v, kvs, batch):
            new = []
            for kv in kvs:
                out, kv = paged_attention.attend(q, k, v, kv, batch, **options)
                q = q + 1e-6 * (out if out.shape == q.shape else out.mean())
                new.append(kv)
            return q, new

        operands = jax.device_put((arguments.q_TKGh, arguments.k_TKh, arguments.v_TKh))
        batch = jax.device_put(arguments.batch)
        program = step.lower(*operands, kvs, batch).compile()

    def run() -> tuple[float, float]:
        nonlocal kvs
        start, cpu = time.perf_counter(), time.process_time()
        out, kvs = program(*operands, kvs, batch)
        out.block_until_ready()
        return (time.perf_counter() - start) / layers, (time.process_time() - cpu) / layers

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--backend", nargs="+", default=list(paged_attention.BACKENDS))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    probe = bandwidth_probe()
    columns = f"{'us/layer':>10}{'cpu us':>9}{'GB/s':>7}{'memory':>8}{'x floor':>8}{'GFLOP/s':>9}{'a cpu s':>9}"
    print(f"{'case':24}{'backend':>8}{'dtype':>10}" + columns)
    for name, case in BENCH_CASES.items():
        if args.case not in name:
            continue
        bodies = [(backend, np.dtype(dtype)) for backend in args.backend for dtype in args.dtype]
        runs = [prepare(case, *body) for body in bodies]
        times: list[list[tuple[float, float]]] = [[] for _ in bodies]
        probes = []
        for _ in range(args.repeat):
            probes.append(probe())
            for run, mine in zip(runs, times, strict=True):
                mine.append(run())
        bandwidth = statistics.quantiles(probes, n=4)[2]
        for (backend, dtype), mine in zip(bodies, times, strict=True):
            nbytes, flops = work(case, dtype)
            wall, cpu = (statistics.quantiles(column, n=4)[0] for column in zip(*mine, strict=True))
            print(
                f"{name:24}{backend:>8}{dtype.name:>10}{wall * 1e6:10.0f}{cpu * 1e6:9.0f}{nbytes / wall / 1e9:7.1f}"
                f"{bandwidth / 1e9:8.1f}{wall * bandwidth / nbytes:8.2f}{flops / wall / 1e9:9.1f}{flops / cpu / 1e9:9.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
