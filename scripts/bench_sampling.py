"""Times the sampling step without its logits: everything between a row of logits and its token.

    python scripts/bench_sampling.py [--vocab 49152] [--rows 1 16 64] [--case "top-p"]

Each case is a batch in which every row asks for the same thing, or (with "one row") only the first does. Times are
lower quartiles of wall clock in microseconds; `cpu` is of all threads together.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ops import sampling
from serving.engine.device.programs.packing import sample_layout
from serving.engine.device.programs.state import DeviceState
from serving.engine.device.programs.steps import sample_rows

PLAIN = {"temperature_S": 0.0, "top_p_S": 1.0, "repetition_S": 1.0, "num_logprobs_S": -1}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature_S": 1.0},
    "top-k 40": {"temperature_S": 1.0, "top_k_S": 40},
    "top-p 0.9": {"temperature_S": 1.0, "top_p_S": 0.9},
    "min-p 0.05": {"temperature_S": 1.0, "min_p_S": 0.05},
    "top-k 40, top-p 0.9": {"temperature_S": 1.0, "top_k_S": 40, "top_p_S": 0.9},
    "top-k 5000": {"temperature_S": 1.0, "top_k_S": 5000},
    "hot, top-p 0.9": {"temperature_S": 2.0, "top_p_S": 0.9},
    "penalties": {"temperature_S": 1.0, "repetition_S": 1.1, "frequency_S": 0.2},
    "bias": {"temperature_S": 1.0, "biased_S": 1},
    "grammar": {"temperature_S": 1.0, "masked": 1},
    "logprobs": {"temperature_S": 1.0, "num_logprobs_S": 5},
}


class Given:
    """A model whose hidden states are the logits."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def logits(self, hidden_RV: jax.Array) -> jax.Array:
        return hidden_RV


def prepare(rows: int, vocab: int, body: sampling.Body):
    """A function of a case (and whether one row alone asks) that runs one step."""
    layout = sample_layout(rows)
    rng = np.random.default_rng(0)
    # Probabilities fall with the rank to the power of 1.5, as a language model's do: 40 tokens have 90 % of them.
    rank = np.stack([rng.permutation(vocab) for _ in range(rows)]) + 1
    logits = jnp.asarray(-1.5 * np.log(rank) + 0.3 * rng.normal(size=rank.shape), jnp.float32)
    mask = jnp.asarray(rng.integers(-(2**31), 2**31, (rows, -(-vocab // 32))), jnp.int32)
    state = DeviceState.zeros(rows, vocab)
    model = Given(vocab)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, logits, flat, mask):
        return sample_rows(model, layout.unpack(flat), state, logits, mask, body)

    def pack(case: dict[str, Any], one_row: bool) -> np.ndarray:
        flat = np.zeros(layout.size, np.int32)
        f = layout.views(flat)
        f["slot_S"][:] = np.arange(rows)
        f["seed_S2"][:, 1] = np.arange(rows)
        for name, value in (PLAIN | {"temperature_S": case.get("temperature_S", 0.0)}).items():
            f[name][:] = value
        for name, value in case.items():
            f[name][: 1 if one_row else None] = value
        return flat

    def run(flat: np.ndarray) -> tuple[float, float]:
        nonlocal state
        start, cpu = time.perf_counter(), time.process_time()
        state, output = step(state, logits, flat, mask)
        jax.block_until_ready(output)
        return time.perf_counter() - start, time.process_time() - cpu

    return pack, run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--body", choices=("native", "xla"), default=sampling.best_body(jax.default_backend()))
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    print(f"{'case':24}" + "".join(f"{f'{rows} rows':>10}{'cpu':>8}" for rows in args.rows))
    made = [prepare(rows, args.vocab, args.body) for rows in args.rows]
    for name, case in CASES.items():
        for one_row in (False, True) if len(case) > 1 and "masked" not in case else (False,):
            label = f"{name}, one row" if one_row else name
            if args.case not in label:
                continue
            line = f"{label:24}"
            for pack, run in made:
                flat = pack(case, one_row)
                run(flat)
                wall, cpu = zip(*(run(flat) for _ in range(args.repeat)), strict=True)
                line += "".join(f"{statistics.quantiles(x, n=4)[0] * 1e6:{w}.0f}" for x, w in ((wall, 10), (cpu, 8)))
            print(line, flush=True)


if __name__ == "__main__":
    main()
