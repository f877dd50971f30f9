"""The CPU's own attention: one C++ handler a layer that writes K and V and attends to pages where they lie.

See `ops/native/attention_step.cc`. It reads the `panels` layout, so whether it can serve a layer is settled when the layer's
pages are allocated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ops import native
from ops.linear import PackedInt8Weight
from ops.linear.weights.native import centred, eps, f32, gain, shift
from ops.norm import TakenNorm
from ops.paged_attention.batch import AttentionBatch, KVSpec
from ops.paged_attention.pages import KVPages

_PANEL = 16  # tokens; as in attention.h
_WIDEST = 256  # channels of a head; as in whole.h


def supports(spec: KVSpec, page_size: int, dtype: np.dtype, platform: str) -> bool:
    """Whether this machine has a kernel for such pages. Builds the library when first asked."""
    together = max(2, 4 // dtype.itemsize)  # channels of K
    fits = page_size % _PANEL == 0 and spec.head_dim % together == 0
    fits = fits and spec.v_head_dim > 0 and spec.v_head_dim % _PANEL == 0
    fits = fits and not spec.indexed  # those are read by plain XLA
    return fits and platform == "cpu" and dtype.name in ("float32", "bfloat16", "int8") and native.available()


def in_8_bits_is_fast() -> bool:
    """Whether this machine multiplies int8 pages as they lie (`attention_int8.h` with VNNI), so that half the bytes are less time;
    elsewhere they are widened first, and bfloat16 pages are faster."""
    return native.available() and native.isa() == "bf16"


def attend(
    q_TKGh: jax.Array,
    k_TKh: jax.Array | None,
    v_TKh: jax.Array | None,
    kv: KVPages,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_KG: jax.Array | None,
) -> tuple[jax.Array, KVPages]:
    """See ops.paged_attention.attend."""
    if k_TKh is None:  # nothing to write: zeros go to the null page
        T, K = q_TKGh.shape[:2]
        k_TKh, v_TKh = (jnp.zeros((T, K, h), jnp.float32) for h in (kv.spec.head_dim, kv.spec.v_head_dim))
        batch = dataclasses.replace(batch, kv_index_T=jnp.zeros_like(batch.kv_index_T))
    if v_TKh is None:  # `supports` has asked for values
        raise NotImplementedError
    return _call(q_TKGh, k_TKh, v_TKh, (), kv, batch, scale, window, softcap, sinks_KG)


def attend_rope(
    qkv_TKgh: jax.Array,
    *rest: Any,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_KG: jax.Array | None,
) -> tuple[jax.Array, KVPages]:
    """`attend` on a fused projection that is not rotated yet: rows of a KV head are its queries, its k, its v.

    Args:
        rest: cos and sin as `ops.rope.cos_sin` gives, or neither, then the pages and the batch.
    """
    (*angles, kv, batch) = rest
    if kv.spec.head_dim != kv.spec.v_head_dim:
        raise NotImplementedError
    nothing = jnp.zeros(0, jnp.float32)
    return _call(qkv_TKgh, nothing, nothing, tuple(angles), kv, batch, scale, window, softcap, sinks_KG)


def _call(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    angles: tuple[jax.Array, ...],
    kv: KVPages,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_KG: jax.Array | None,
) -> tuple[jax.Array, KVPages]:
    if kv.layout != "panels" or kv.platform != "cpu" or not native.available():
        raise NotImplementedError
    T, K = q.shape[:2]
    fused = k.ndim == 1
    pages = [array for array in (kv.k, kv.v, kv.k_scale, kv.v_scale) if array is not None]
    operands = [
        *(x.astype(jnp.float32) for x in (q, k, v)),
        *(angles or (jnp.zeros((0, 0), jnp.float32),) * 2),
        jnp.zeros(0, jnp.float32) if sinks_KG is None else sinks_KG.astype(jnp.float32),
        batch.kv_index_T,
        batch.decode_pages_BP,
        batch.decode_len_B,
        jnp.zeros(0, jnp.int32) if batch.decode_qlen_B is None else batch.decode_qlen_B,
        batch.chunk_pages_RP,
        batch.chunk_start_R,
        batch.chunk_qlen_R,
        batch.chunk_len_R,
    ]
    group = q.shape[2] - 2 if fused else q.shape[2]
    results = [jax.ShapeDtypeStruct((T, K, group, kv.spec.v_head_dim), jnp.float32)]
    results += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pages]
    call = jax.ffi.ffi_call(
        native.target("jaxserve_attention"),
        results,
        input_output_aliases={len(operands) + i: 1 + i for i in range(len(pages))},
    )
    out, *pages = call(
        *operands,
        *pages,
        scale=np.float32(scale),
        softcap=np.float32(softcap or 0.0),
        window=np.int32(min(window or 0, 2**30)),
        places=np.int32(batch.queries),
        whole=np.int32(0),
        mixed=np.int32(kv.mixed),
    )
    names = ("k", "v", "k_scale", "v_scale")
    return out.astype(q.dtype), dataclasses.replace(kv, **dict(zip(names, pages, strict=False)))


def attend_whole(
    q: jax.Array,
    pages: tuple[jax.Array, ...],
    index_T: jax.Array,
    chunk: tuple[jax.Array, ...],
    decode: tuple[jax.Array, jax.Array] | None = None,
    *,
    scale: float,
    angles: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Every token attends to its row's whole context: out [T, K, G, h], float32.

    Args:
        q: fused queries, keys and values [T, K, G + 2, h] and pages (k, v), into which they are written; or queries
            [T, K, G, h] and one array of pages that is read alone, each page's V behind its K. float32, or bfloat16 or its bits.
        index_T: where tokens are written.
        chunk: int32 (pages [R, P], first token, tokens, context) of rows of several tokens.
        decode: int32 (pages [B, P], context) of rows of one, in front of those.
        angles: cosines and sines [T, h / 2] of what turns with its place.
    """
    reads = len(pages) == 1
    (T, K, group, h), nothing = q.shape, jnp.zeros(0, jnp.float32)
    none = jnp.zeros(0, jnp.int32)
    decode_pages, decode_len = decode or (none.reshape(0, 1), none)
    operands = [
        q.astype(jnp.float32), nothing, nothing, *(angles or (jnp.zeros((0, 0), jnp.float32),) * 2), nothing, index_T,
        decode_pages, decode_len, none, *chunk,
    ]  # fmt: skip
    results = [jax.ShapeDtypeStruct((T, K, group if reads else group - 2, h), jnp.float32)]
    aliases = {} if reads else {len(operands) + i: 1 + i for i in range(2)}
    results += [] if reads else [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pages]
    call = jax.ffi.ffi_call(native.target("jaxserve_attention"), results, input_output_aliases=aliases)
    how = {"scale": np.float32(scale), "softcap": np.float32(0), "window": np.int32(0), "places": np.int32(1)}
    return call(*operands, *pages, **how, whole=np.int32(1), mixed=np.int32(0))[0]


def in_int8(head_dim: int) -> bool:
    """Whether this machine attends among all fastest by `attend_among`."""
    return head_dim <= _WIDEST and native.available() and native.isa() in ("vnni", "bf16")


def attend_among(
    qkv_THgh: jax.Array, count_R: jax.Array, scale: float, angles: tuple[jax.Array, jax.Array] | None
) -> jax.Array:
    """In each of R rows of equal length every token attends to the first `count` ones: out [T, H, h], float32. See
    `ops/native/whole/`."""
    T, H, _, h = qkv_THgh.shape
    call = jax.ffi.ffi_call(native.target("jaxserve_attend_whole"), jax.ShapeDtypeStruct((T, H, h), jnp.float32))
    turns = angles or (jnp.zeros((0, 0), jnp.float32),) * 2
    return call(qkv_THgh.astype(jnp.float32), *turns, count_R.astype(jnp.int32), scale=np.float32(scale))


def kept(
    x_SD: jax.Array,
    weights: Sequence[PackedInt8Weight],
    biases: Sequence[jax.Array | None],
    heads: int,
    norm: TakenNorm | None,
    size: int,
) -> jax.Array:
    """uint16 [size]: of each weight [H, K and V, h; D] the product with norm(x), as pages that are only read have it. All are
    rotated, or none."""
    call = jax.ffi.ffi_call(native.target("jaxserve_int8_keep"), jax.ShapeDtypeStruct((size,), jnp.uint16))
    operands = (operand for one, bias in zip(weights, biases, strict=True) for operand in one.operands(bias))
    around = {"eps": eps(norm), "centred": centred(norm), "rotated": np.int64(weights[0].rotated)}
    return call(f32(x_SD), gain(norm), shift(norm), *operands, **around, heads=np.int64(heads))
