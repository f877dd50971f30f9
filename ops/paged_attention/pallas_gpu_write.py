"""The GPU kernel that puts a step's tokens into their pages, in place: one pass over what is new, nothing else touched."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from ops.paged_attention.pages import KVPages
from ops.paged_attention.pallas_gpu_attend import load_channels, pieces, store_channels
from ops.refs import Ref

TOKENS = 16
"""Tokens a program writes."""


def write(kv: KVPages, k_TKh: jax.Array, v_TKh: jax.Array | None, index_T: jax.Array, *, interpret: bool) -> KVPages:
    """The pages, in rows, with tokens' K and V at `index = page * page_size + offset`.

    Nothing is written for the null page and for indices out of range. int8 pages get a scale a token and head.
    """
    T, K, _ = k_TKh.shape
    arrays = {name: getattr(kv, name) for name in ("k", "v", "k_scale", "v_scale") if getattr(kv, name) is not None}
    new = [k_TKh] + ([] if v_TKh is None else [v_TKh])
    outputs = pl.pallas_call(
        functools.partial(_write_kernel, names=tuple(arrays), num_new=len(new)),
        grid=(-(-T // TOKENS), K),
        out_shape=tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays.values()),
        input_output_aliases={1 + len(new) + i: i for i in range(len(arrays))},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="paged_attention_write",
    )(index_T, *new, *arrays.values())
    return dataclasses.replace(kv, **dict(zip(arrays, outputs, strict=True)))


def _write_kernel(index_T: Ref, *refs: Ref, names: tuple[str, ...], num_new: int):
    new = dict(zip(("k", "v"), refs[:num_new], strict=False))
    pages = dict(zip(names, refs[num_new + len(names) :], strict=True))
    num_pages, _, page_size, _ = pages["k"].shape
    head = pl.program_id(1)
    token_N = pl.program_id(0) * TOKENS + jnp.arange(TOKENS, dtype=jnp.int32)
    inside_N = token_N < index_T.shape[0]
    token_N = jnp.where(inside_N, token_N, 0)
    index_N = plt.load(index_T.at[token_N])
    inside_N &= (index_N >= page_size) & (index_N < num_pages * page_size)
    index_N = jnp.where(inside_N, index_N, 0)
    at = jax.lax.div(index_N, page_size), head, jax.lax.rem(index_N, page_size)
    for name, source in new.items():
        target, scales = pages[name], pages.get(f"{name}_scale")
        parts = pieces(source.shape[2])
        values = [load_channels(source, (token_N, head), piece, inside_N).astype(jnp.float32) for piece in parts]
        if scales is not None:
            largest_N = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(x), axis=1) for x in values))
            scale_N = largest_N * (1.0 / 127.0)
            plt.store(scales.at[at], scale_N, mask=inside_N)
            share_N1 = jnp.where(scale_N == 0.0, 1.0, scale_N)[:, None]
            values = [_round(x / share_N1) for x in values]
        elif target.dtype.itemsize == 1:
            limit = float(jnp.finfo(target.dtype).max)
            values = [jnp.clip(x, -limit, limit) for x in values]  # a cast beyond e4m3's range gives NaN
        for piece, value in zip(parts, values, strict=True):
            store_channels(target, at, piece, value.astype(target.dtype), inside_N)


def _round(x: jax.Array) -> jax.Array:
    """To the nearest whole number, ties to even: |x| <= 127. Triton's lowering has no rounding, but floor."""
    below = jnp.floor(x)
    rest = x - below
    odd = below - 2.0 * jnp.floor(below * 0.5)
    return below + jnp.where((rest > 0.5) | ((rest == 0.5) & (odd == 1.0)), 1.0, 0.0)
