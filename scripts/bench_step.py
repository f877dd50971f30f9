"""Times whole decode and prefill steps of a model against the bytes they must read.

    python scripts/bench_step.py [--model ...] [--kv bfloat16 float32] [--decode 1x256 64x256 8x4096] [--prefill 1024]

`--decode BxS` is B requests that have S positions each, `--prefill N` one fresh chunk of N tokens. For each it prints the
milliseconds of the layers, of the logits and of the draw (temperature 1, top-p 0.9; lower quartiles of wall clock), and
the floor: all weights, and the pages of the contexts, over the bandwidth that memory gave between the runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_attention import bandwidth_probe
from flax import nnx

from models.api import Step
from models.loading.load import load_model, resolve
from ops import paged_attention, sampling
from ops.paged_attention import Q_BLOCK, AttentionBatch
from ops.recurrent import RecurrentBatch
from serving.engine.device.stores.state_store import StateStore
from serving.engine.requests.cache_specs import recurrent_of


def make_step(
    decode: tuple[int, ...], chunk: int, vocab_size: int, recurrent: bool, page_size: int
) -> tuple[Step, int]:
    """A step of decode rows with these context lengths, or of one chunk; and the number of pages. Pages are scattered.

    Args:
        recurrent: row r's state is in slot r, a chunk's in slot 0.
    """
    lengths = np.asarray([*decode, *([chunk] if chunk else [])], np.int32)
    width = -(-int(lengths.max()) // page_size)
    table = 1 + np.random.default_rng(0).permutation(len(lengths) * width).reshape(len(lengths), width).astype(np.int32)
    rows, padded = len(decode), -(-chunk // Q_BLOCK) * Q_BLOCK
    at = np.concatenate([lengths[:rows] - 1, np.arange(chunk), np.zeros(padded - chunk, np.int64)]).astype(np.int32)
    row = np.concatenate([np.arange(rows), np.full(padded, rows)]).astype(np.int32)
    row = np.minimum(row, len(lengths) - 1)
    chunks = np.zeros(1 if chunk else 0, np.int32)
    batch = AttentionBatch(
        kv_index_T=table[row, at // page_size] * page_size + at % page_size,  # pyright: ignore[reportArgumentType]
        decode_pages_BP=table[:rows],  # pyright: ignore[reportArgumentType]
        decode_len_B=lengths[:rows],  # pyright: ignore[reportArgumentType]
        chunk_pages_RP=table[rows:],  # pyright: ignore[reportArgumentType]
        chunk_start_R=chunks,  # pyright: ignore[reportArgumentType]
        chunk_qlen_R=chunks + chunk,  # pyright: ignore[reportArgumentType]
        chunk_len_R=chunks + chunk,  # pyright: ignore[reportArgumentType]
        chunk_row_N=np.zeros(padded // Q_BLOCK, np.int32),  # pyright: ignore[reportArgumentType]
    )
    tokens_T = np.random.default_rng(1).integers(0, vocab_size, len(at)).astype(np.int32)
    states = None
    if recurrent:
        slots = np.arange(rows, dtype=np.int32)
        fields = (slots, lengths[:rows] - 1, np.ones(rows, np.int32), chunks, chunks, chunks, chunks + chunk)
        states = RecurrentBatch(*fields, num_tokens=len(at))  # pyright: ignore[reportArgumentType]
    last = chunks + 1 if chunk else None  # of a prompt, the token that samples is read
    step = Step(tokens_T, at, batch, recurrent=states, last_R=last)  # pyright: ignore[reportArgumentType]
    return jax.device_put(step), table.size + 1


def noise(pages: jax.Array) -> jax.Array:
    """Numbers of all sizes in the pages' own memory: all that nobody has written to is one page of zeros, in every cache."""
    bits = jax.lax.iota(jnp.uint32, pages.size) * np.uint32(2654435761) >> np.uint32(24)
    values = (bits.astype(jnp.int32) - 128).reshape(pages.shape)
    return values.astype(jnp.int8) if pages.dtype == jnp.int8 else (values / 128).astype(pages.dtype)


def prepare(
    model: Any, decode: tuple[int, ...], chunk: int, kv_dtype: str, page_size: int | None = None
) -> tuple[dict[str, Callable], int]:
    """Functions that run the layers, the logits and the draw of one step and wait; and the bytes of K and V to be read."""
    page_size = page_size or paged_attention.default_page_size(kv_dtype, jax.default_backend())
    recurrent = recurrent_of(model)
    step, num_pages = make_step(decode, chunk, model.vocab_size, recurrent is not None, page_size)
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(
        state
    )  # flat, as the engine hands them over: walking the state costs milliseconds a call
    specs = model.kv_specs()
    kv = tuple(paged_attention.allocate(spec, num_pages, page_size, jnp.dtype(kv_dtype)) for spec in specs)
    kv = jax.jit(lambda kv: jax.tree.map(noise, kv), donate_argnums=0, keep_unused=True)(kv)
    rows = len(decode) or 1
    if recurrent is not None:
        kv += (StateStore(recurrent, rows, 0, None).states,)

    @jax.jit
    def logits(leaves, hidden_RD):
        return nnx.merge(graphdef, tree.unflatten(leaves)).logits(hidden_RD)

    def forward(leaves, step, kv):
        result = nnx.merge(graphdef, tree.unflatten(leaves)).forward(step, kv)
        first = 0 if decode else chunk - 1
        return result.hidden_TD[first : first + rows], result.cache

    program = jax.jit(forward, donate_argnums=2).lower(leaves, step, kv).compile()
    hidden_RD, kv = program(leaves, step, kv)
    logits_RV = logits(leaves, hidden_RD)
    zeros_R = jnp.zeros(rows, jnp.int32)
    edits = sampling.Edits(
        slot_R=zeros_R,
        repetition_R=jnp.ones(rows),
        presence_R=jnp.zeros(rows),
        frequency_R=jnp.zeros(rows),
        biased_R=zeros_R > 0,
        held_back_R=zeros_R > 0,
        masked=jnp.asarray(False),
        seen_NV=jnp.zeros((1, model.vocab_size), jnp.int16),
        bias_ids_NE=jnp.zeros((1, 1), jnp.int32),
        bias_values_NE=jnp.zeros((1, 1)),
        banned_ids_NE=jnp.zeros((1, 1), jnp.int32),
        mask_RW=None,
    )
    body = sampling.best_body(jax.default_backend())

    @jax.jit
    def draw(logits_RV):
        seeds_R2 = jnp.stack([zeros_R, jnp.arange(rows)], axis=1).astype(jnp.uint32)
        filters = {"top_k_R": zeros_R, "min_p_R": jnp.zeros(rows), "seed_R2": seeds_R2, "step_R": zeros_R}
        ones = {"temperature_R": jnp.ones(rows), "top_p_R": jnp.full(rows, 0.9)}
        return sampling.choose(logits_RV, edits, **filters, **ones, body=body)

    def run_layers() -> None:
        nonlocal kv
        out, kv = program(leaves, step, kv)
        out.block_until_ready()

    bytes_a_page = sum(paged_attention.bytes_per_page(spec, page_size, jnp.dtype(kv_dtype)) for spec in specs)
    return {
        "layers": run_layers,
        "logits": lambda: logits(leaves, hidden_RD).block_until_ready(),
        "draw": lambda: draw(logits_RV).block_until_ready(),
    }, sum(decode) * bytes_a_page // page_size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", help="GGUF file, directory or hub id; default: the default model")
    parser.add_argument("--quantization", default="int8", help="a scheme of the server's --quantization, or none")
    parser.add_argument("--kv", nargs="+", default=["bfloat16", "float32"], help="what pages hold")
    parser.add_argument("--decode", nargs="*", default=["1x256", "16x256", "64x256", "8x4096"], metavar="BxS")
    parser.add_argument("--prefill", nargs="*", type=int, default=[1024], metavar="N")
    parser.add_argument("--page-size", type=int, metavar="N", help="tokens (default: the server's)")
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    scheme = None if args.quantization == "none" else args.quantization
    model = load_model(resolve(args.model), dtype="float32", quantization=scheme, max_model_len=8192).model
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.split(model)[1]))
    probe = bandwidth_probe()
    cases = [(f"decode {case}", (int(case.split("x")[1]),) * int(case.split("x")[0]), 0) for case in args.decode]
    cases += [(f"prefill {tokens}", (), tokens) for tokens in args.prefill]
    print(
        f"{'step':16}{'pages':>10}{'layers':>9}{'logits':>9}{'draw':>7}{'GB':>7}{'GB/s':>7}{'floor':>8}{'x floor':>9}"
    )
    for name, decode, chunk in cases:
        for kv_dtype in args.kv:
            parts, kv_bytes = prepare(model, decode, chunk, kv_dtype, args.page_size)
            times: dict[str, list[float]] = {part: [] for part in parts}
            probes = []
            for _ in range(args.repeat):
                probes.append(probe())
                for part, run in parts.items():
                    start = time.perf_counter()
                    run()
                    times[part].append((time.perf_counter() - start) * 1e3)
            bandwidth = statistics.quantiles(probes, n=4)[2]
            ms = {part: statistics.quantiles(mine, n=4)[0] for part, mine in times.items()}
            floor = (weights + kv_bytes) / bandwidth * 1e3
            print(
                f"{name:16}{kv_dtype:>10}{ms['layers']:9.2f}{ms['logits']:9.2f}{ms['draw']:7.2f}"
                f"{(weights + kv_bytes) / 1e9:7.2f}{bandwidth / 1e9:7.1f}{floor:8.2f}{sum(ms.values()) / floor:9.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
