"""What a GPU can do, and what of it attention and a whole decode step get: arrays and our ops only, no model files."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ops import paged_attention
from ops.linear import gated_mlp, linear
from ops.norm import rms_norm
from ops.paged_attention import pages
from ops.paged_attention.batch import Q_BLOCK, AttentionBatch, KVSpec
from ops.paged_attention.cases import Case
from ops.rope import inverse_frequencies


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured: bytes a second to memory and bfloat16 operations a second."""

    bandwidth: float
    flops: float


def seconds(fn: Callable[[], Any], runs: int) -> float:
    """Median wall time of a call and its wait, after two for warming up."""
    for _ in range(2):
        jax.block_until_ready(fn())
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        jax.block_until_ready(fn())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def repeated(body: Callable[[Any], Any], state: Any, repeats: int, runs: int) -> float:
    """Seconds of one `state = body(state)`: `repeats` of them in one program, so that dispatching them is not timed."""
    loop = jax.jit(lambda s: jax.lax.fori_loop(0, repeats, lambda _, s: body(s), s), donate_argnums=0)
    held = [state]

    def call() -> Any:
        held[0] = loop(held[0])
        return held[0]

    return seconds(call, runs) / repeats


def ceilings(num_bytes: int, side: int, runs: int) -> Ceilings:
    """Bandwidth as the better of copying and reading `num_bytes`; flops of a square product of random bfloat16."""
    x = jax.random.normal(jax.random.key(0), (num_bytes // 4,), jnp.float32)
    copy = seconds(functools.partial(jax.jit(lambda x: x + 1.0), x), runs)
    read = seconds(functools.partial(jax.jit(jnp.sum), x), runs)
    bandwidth = max(2 * x.nbytes / copy, x.nbytes / read)
    del x
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in (1, 2))
    product = seconds(functools.partial(jax.jit(jnp.matmul), a, b), runs)
    return Ceilings(bandwidth, 2.0 * side**3 / product)


def make_batch(case: Case, seed: int = 0) -> tuple[AttentionBatch, int]:
    """A case's batch over scattered pages, and how many pages there are. Chunk pieces must be whole blocks."""
    rng = np.random.default_rng(seed)
    size, R = case.page_size, len(case.chunks)
    totals = [*case.decode, *(before + new for before, new in case.chunks)]
    news = [*(1 for _ in case.decode), *(new for _, new in case.chunks)]
    counts = [-(-total // size) for total in totals]
    num_pages = sum(counts) + 1
    free = iter(rng.permutation(np.arange(1, num_pages)))
    tables = np.zeros((len(totals), max(counts)), np.int32)
    for row, count in enumerate(counts):
        tables[row, :count] = [next(free) for _ in range(count)]
    positions = [np.arange(total - new, total) for total, new in zip(totals, news, strict=True)]
    index = [tables[row][at // size] * size + at % size for row, at in enumerate(positions)]
    B = len(case.decode)
    starts = np.cumsum([0, *news[B:]])[:-1]
    assert all(new % Q_BLOCK == 0 for new in news[B:])
    arrays = (
        np.concatenate(index), tables[:B], case.decode, tables[B:], starts, news[B:],
        totals[B:], np.repeat(np.arange(R), [new // Q_BLOCK for new in news[B:]]) if R else [],
    )  # fmt: skip
    batch = AttentionBatch(*(jnp.asarray(np.asarray(a), jnp.int32) for a in arrays))
    return batch, num_pages


def random_pages(spec: KVSpec, num_pages: int, page_size: int, dtype: str, key: jax.Array) -> pages.KVPages:
    """Pages full of random numbers: zeros would be kinder to the hardware than what it will meet."""
    kv = paged_attention.allocate(spec, num_pages, page_size, dtype)
    leaves, tree = jax.tree.flatten(kv)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [_fill(leaf, k) for leaf, k in zip(leaves, keys, strict=True)])


@functools.partial(jax.jit, donate_argnums=0)
def _fill(leaf: jax.Array, key: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.int8:
        return jax.random.randint(key, leaf.shape, -127, 128, jnp.int8)
    return jax.random.normal(key, leaf.shape, jnp.bfloat16).astype(leaf.dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _matrix(key: jax.Array, out: int, into: int, dtype: str) -> jax.Array:
    return jax.random.normal(key, (out, into), dtype) * into**-0.5


@dataclasses.dataclass(frozen=True)
class AttentionRow:
    """One case: its time, and the bytes and operations that it cannot avoid."""

    name: str
    seconds: float
    bytes: float
    flops: float


def attention(name: str, case: Case, kv_dtype: str, activations: str, repeats: int, runs: int) -> AttentionRow:
    """Writes and attends over and over, each time with queries that depend on the last result."""
    batch, num_pages = make_batch(case)
    spec, K, G = case.spec, case.num_kv_heads, case.group
    kv = random_pages(spec, num_pages, case.page_size, kv_dtype, jax.random.key(3))
    T = batch.num_tokens
    q = jax.random.normal(jax.random.key(4), (T, K, G, spec.head_dim), activations)
    k = jax.random.normal(jax.random.key(5), (T, K, spec.head_dim), activations)
    v = jax.random.normal(jax.random.key(6), (T, K, spec.v_head_dim), activations) if spec.v_head_dim else None

    def body(state):
        q, kv = state
        out, kv = paged_attention.attend(q, k, v, kv, batch, scale=spec.head_dim**-0.5, window=case.window)
        width = min(out.shape[-1], q.shape[-1])
        return q.at[..., :width].add(out[..., :width] * 0.01), kv

    took = repeated(body, (q, kv), repeats, runs)
    token_bytes = paged_attention.bytes_per_page(spec, 1, kv_dtype)
    keys = sum(min(n, case.window or n) for n in case.decode) + sum(before + new for before, new in case.chunks)
    pairs = float(sum(case.decode) + sum(new * before + new * (new + 1) / 2 for before, new in case.chunks))
    width = spec.head_dim + (spec.v_head_dim or spec.head_dim)
    return AttentionRow(name, took, float(keys * token_bytes), 2.0 * pairs * K * G * width)


@dataclasses.dataclass(frozen=True)
class Llama:
    """Sizes of a Llama, as its config.json has them."""

    embed: int = 4096
    ffw: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 128256


def llama_weights(model: Llama, dtype: str) -> dict[str, Any]:
    """Random weights, [out, in]; layers apart, as the server keeps them."""
    keys = iter(jax.random.split(jax.random.key(7), 4 * model.layers + 2))

    def matrix(out: int, into: int) -> jax.Array:
        return _matrix(next(keys), out, into, dtype)

    K, h, D = model.kv_heads, model.head_dim, model.embed
    layers = [
        {
            "qkv": matrix((model.heads + 2 * K) * h, D),
            "out": matrix(D, model.heads * h),
            "gate_up": matrix(2 * model.ffw, D),
            "down": matrix(D, model.ffw),
            "norm": jnp.ones((2, D), dtype),
        }
        for _ in range(model.layers)
    ]
    return {"embed": matrix(model.vocab, D), "head": matrix(model.vocab, D), "layers": layers}


def decode_step(
    model: Llama, requests: int, context: int, kv_dtype: str, dtype: str, repeats: int, runs: int
) -> tuple[float, float]:
    """(seconds, bytes of weights and KV that a step must read): embedding, layers, logits and the largest of them."""
    K, G, h = model.kv_heads, model.heads // model.kv_heads, model.head_dim
    case = Case(decode=(context,) * requests, num_kv_heads=K, group=G, head_dim=h)
    batch, num_pages = make_batch(case)
    weights = llama_weights(model, dtype)
    kv = [random_pages(case.spec, num_pages, case.page_size, kv_dtype, jax.random.key(i)) for i in range(model.layers)]
    rotary = inverse_frequencies({"rope_theta": 500000.0}, model.head_dim)
    positions_B = batch.decode_len_B - 1

    def step(weights, tokens_B, kv):
        x_BD = weights["embed"][tokens_B]
        new_kv = []
        for layer, pages_of_layer in zip(weights["layers"], kv, strict=True):
            qkv = linear(rms_norm(x_BD, layer["norm"][0], 1e-5), layer["qkv"]).reshape(-1, K, G + 2, h)
            out, done = paged_attention.attend_rope(qkv, positions_B, rotary, pages_of_layer, batch, scale=h**-0.5)
            new_kv.append(done)
            x_BD = linear(out.reshape(requests, -1), layer["out"], residual_TO=x_BD)
            normed = rms_norm(x_BD, layer["norm"][1], 1e-5)
            x_BD = gated_mlp(normed, layer["gate_up"], layer["down"], "silu", residual_TD=x_BD)
        logits_BV = linear(x_BD, weights["head"], out_dtype=jnp.float32)
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), new_kv

    compiled = jax.jit(step, donate_argnums=2)
    state = [jnp.arange(requests, dtype=jnp.int32), kv]

    def call() -> Any:  # as the server does: one program a step, the next dispatched while this one runs
        for _ in range(repeats):
            state[0], state[1] = compiled(weights, state[0], state[1])
        return state[0]

    took = seconds(call, runs) / repeats
    read = [x for name, tree in weights.items() if name != "embed" for x in jax.tree.leaves(tree)]
    context_bytes = model.layers * requests * context * paged_attention.bytes_per_page(case.spec, 1, kv_dtype)
    return took, float(sum(x.nbytes for x in read) + context_bytes)


def decode_cases(smoke: bool) -> Sequence[tuple[str, Case, str]]:
    """(name, case, what pages hold); Llama-3.1-8B's layer unless said otherwise."""
    if smoke:
        tiny = functools.partial(Case, num_kv_heads=2, group=2, head_dim=32)
        return [("3 ragged", tiny(decode=(40, 7, 90)), "float32"), ("3 ragged, int8", tiny(decode=(40, 7, 90)), "int8")]
    layer = functools.partial(Case, num_kv_heads=8, group=4, head_dim=128)
    latent = Case(decode=(4096,) * 64, num_kv_heads=1, group=16, head_dim=576, v_head_dim=0)
    ragged = tuple(int(n) for n in np.random.default_rng(0).integers(64, 8192, 128))
    return [
        ("256 x 1024", layer(decode=(1024,) * 256), "bfloat16"),
        ("64 x 4096", layer(decode=(4096,) * 64), "bfloat16"),
        ("16 x 16384", layer(decode=(16384,) * 16), "bfloat16"),
        ("2 x 131072", layer(decode=(131072,) * 2), "bfloat16"),
        ("128 ragged, 64 to 8192", layer(decode=ragged), "bfloat16"),
        ("64 x 4096, pages of 64", layer(decode=(4096,) * 64, page_size=64), "bfloat16"),
        ("64 x 4096, int8", layer(decode=(4096,) * 64), "int8"),
        ("64 x 4096, e4m3", layer(decode=(4096,) * 64), "float8_e4m3fn"),
        ("64 x 4096, one KV head of 8 queries", Case(decode=(4096,) * 64, num_kv_heads=1, group=8, head_dim=128), "bfloat16"),
        ("64 x 4096, latent 576, 16 heads", latent, "bfloat16"),
    ]  # fmt: skip


def prefill_cases(smoke: bool) -> Sequence[tuple[str, Case, str]]:
    """As decode_cases."""
    if smoke:
        return [("2 pieces", Case(chunks=((0, 32), (20, 16)), num_kv_heads=2, group=2, head_dim=32), "float32")]
    layer = functools.partial(Case, num_kv_heads=8, group=4, head_dim=128)
    return [
        ("1 x 8192", layer(chunks=((0, 8192),)), "bfloat16"),
        ("1 x 4096", layer(chunks=((0, 4096),)), "bfloat16"),
        ("8 x 512", layer(chunks=((0, 512),) * 8), "bfloat16"),
        ("2048 after 6144", layer(chunks=((6144, 2048),)), "bfloat16"),
        ("2048 after 30720", layer(chunks=((30720, 2048),)), "bfloat16"),
        ("1 x 4096, int8", layer(chunks=((0, 4096),)), "int8"),
    ]


def tunings(smoke: bool, chunks: bool) -> Sequence[tuple[int, int, int, int]]:
    """(rows, keys, warps, stages) to try for Llama's layer."""
    if smoke:
        return [(16, 32, 4, 2)]
    if chunks:
        return [
            (rows, keys, warps, stages)
            for rows in (64, 128)
            for keys in (32, 64, 128)
            for warps in (4, 8)
            for stages in (2, 3)
        ]
    return [(16, keys, warps, stages) for keys in (32, 64, 128) for warps in (2, 4, 8) for stages in (2, 3, 4)]


def with_tuning(
    sizes: tuple[int, int, int, int], case: Case, dtype: str, activations: str, repeats: int, runs: int
) -> AttentionRow:
    """`attention` with these sizes instead of those that the kernels would choose."""
    from ops.paged_attention import pallas_gpu
    from ops.paged_attention.pallas_gpu_attend import Tuning

    name = "chunk_tuning" if case.chunks else "decode_tuning"
    chosen = getattr(pallas_gpu, name)
    setattr(pallas_gpu, name, lambda *_: Tuning(*sizes))
    try:
        label = "rows {}, keys {}, warps {}, stages {}".format(*sizes)
        return attention(label, case, dtype, activations, repeats, runs)
    finally:
        setattr(pallas_gpu, name, chosen)
