"""Attention of one step's tokens over paged K and V.

One face, several bodies: the first of `BACKENDS` that does not decline with NotImplementedError runs; `xla` never
declines. `use_backend` forces one. `AttentionBatch`, `KVSpec` and the padding rules are in `batch.py`. Where whole sequences are
given (`Sequences`) there are no pages, and one body, which differentiates.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ops.paged_attention import mixing, native, pallas_gpu, pallas_tpu, sequences, shared, xla
from ops.paged_attention import pages as _pages
from ops.paged_attention.batch import Q_BLOCK, AttentionBatch, KVSpec
from ops.paged_attention.groups import KVGroups
from ops.paged_attention.mixing import mixed_whole
from ops.paged_attention.native import in_8_bits_is_fast
from ops.paged_attention.pages import KVPages, Layout, bytes_per_page
from ops.paged_attention.sequences import Sequences
from ops.paged_attention.shared import of_array as array_pages
from ops.paged_attention.shared import of_layer as layer_pages
from ops.per_device import per_device
from ops.rope import cos_sin, rope

__all__ = [
    "BACKENDS",
    "Q_BLOCK",
    "AttentionBatch",
    "KVGroups",
    "KVPages",
    "KVSpec",
    "Sequences",
    "allocate",
    "array_pages",
    "attend",
    "attend_rope",
    "best_layout",
    "bytes_per_page",
    "default_page_size",
    "in_8_bits_is_fast",
    "layer_pages",
    "least_page_size",
    "mixed_whole",
    "use_backend",
]

BACKENDS: dict[str, Callable[..., tuple[jax.Array, KVPages]]] = {
    "native": native.attend,
    "pallas_tpu": mixing.around(pallas_tpu.attend),
    "pallas_gpu": mixing.around(pallas_gpu.attend),
    "xla": mixing.around(xla.attend),
}
"""Implementations by name, best first."""

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("paged_attention_backend", default=None)


@contextlib.contextmanager
def use_backend(name: str | None) -> Generator[None]:
    """Within it, `allocate` and (when traced) `attend` use only this backend; None chooses freely again.

    Raises:
        ValueError: an unknown name.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"Unknown attention backend {name!r}; there are {', '.join(BACKENDS)}.")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def allocate(
    spec: KVSpec,
    num_pages: int,
    page_size: int,
    dtype: jax.typing.DTypeLike,
    mesh: jax.sharding.Mesh | None = None,
) -> KVPages:
    """Zeroed pages for one layer, in the layout that the best backend for them reads.

    Args:
        num_pages: pages of each replica (see `mesh`), the null page 0 included; at least 2.
        page_size: tokens a page.
        dtype: float32, bfloat16, float16, float8_e4m3fn, float8_e5m2, or int8 (one scale a token and head is kept
            beside it).
        mesh: KV heads are split over its `model` axis when that divides them, else every device keeps all. Each index of
            its `data` axis is a replica with pages of its own.
    Raises:
        ValueError: a dtype or size that no backend takes.
    """
    layout = best_layout(spec, page_size, dtype, _pages.platform_of(mesh))
    return _pages.allocate(spec, num_pages, page_size, dtype, mesh, layout)


def best_layout(spec: KVSpec, page_size: int, dtype: jax.typing.DTypeLike, platform: str) -> Layout:
    """How pages lie for the backend that will read them on `platform` ("cpu", "gpu", "tpu")."""
    forced = _forced.get()
    kinds = spec.kinds or (spec,)
    if forced in (None, "native") and all(native.supports(k, page_size, np.dtype(dtype), platform) for k in kinds):
        return "panels"
    wants_lanes = forced == "pallas_tpu" or (forced is None and platform == "tpu")
    return "lanes" if wants_lanes and pallas_tpu.supports(page_size, dtype) else "rows"


def default_page_size(dtype: str, platform: str) -> int:
    """Tokens of a page where nobody asks for another number: 16, and 64 of int8 on a CPU. K of a head of 64 is 4 KB in a row then;
    runs of 1 KB come from memory at two thirds of the rate (docs/benchmarks/notes_attention.md)."""
    return 64 if platform == "cpu" and dtype == "int8" else 16


def least_page_size(dtype: jax.typing.DTypeLike, platform: str) -> int:
    """Tokens a page must hold at least for the platform's kernels to read it: a TPU copies whole tiles; 1 elsewhere."""
    return pallas_tpu.least_page_size(dtype) if platform == "tpu" else 1


def attend(
    q_TKGh: jax.Array,
    k_TKh: jax.Array | None,
    v_TKh: jax.Array | None,
    kv: KVPages,
    batch: AttentionBatch | Sequences,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_KG: jax.Array | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, KVPages]:
    """Writes this step's K and V into their pages, then attends causally over each request's positions so far.

    Args:
        q_TKGh: queries, T = B decode rows of Q places then C chunk tokens, heads grouped by the KV head they read. Any float
            dtype.
        k_TKh, v_TKh: this step's keys and values, rotated already; heads of v may have another size. v is None when
            the layer keeps one latent for both (KVSpec.v_head_dim == 0). Both are None when the pages have this step's already:
            those of another layer, which wrote them; they are only read.
        kv: the layer's pages (`layer_pages`). Donate them to the jitted step: they are updated in place. Where their heads are
            larger, as layers that share arrays may have them (`groups`), q, k and v are filled up with zeros, which change no
            score.
        batch: where the tokens stand; see AttentionBatch. With Sequences nothing is kept: what is
            returned as pages are k and v, for a layer that reads another's.
        scale: multiplies q . k.
        window: attend this many positions back, itself included; None for all.
        softcap: scores become softcap * tanh(score / softcap).
        sinks_KG: a logit a head that joins the softmax's denominator with no value behind it.
        chunk: positions are cut into pieces of so many, and attend within their own alone (Llama 4); None for no such limit.
            Only the plain XLA body does it.
    Returns:
        (out_TKGh of v's head size in q's dtype, the updated pages). Padded tokens yield zeros. Softmax is float32; the
        products are float32 on CPU unless pages are bfloat16.
    """
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    if isinstance(batch, Sequences):
        kept: Any = kv if k_TKh is None else (k_TKh, v_TKh)
        out_TKGh = sequences.attend(q_TKGh, kept[0], kept[1], batch, sinks_KG=sinks_KG, chunk=chunk, **options)
        return out_TKGh, kept
    if q_TKGh.shape[-1] < kv.spec.head_dim:
        q, k, v = (None if x is None else _filled(x, kv.spec.head_dim) for x in (q_TKGh, k_TKh, v_TKh))
        assert q is not None
        out_TKGh, kv = attend(q, k, v, kv, batch, sinks_KG=sinks_KG, chunk=chunk, **options)
        return out_TKGh[..., : q_TKGh.shape[-1]], kv
    if batch.chunk_ahead_C is not None:
        plain = dataclasses.replace(batch, chunk_ahead_C=None)
        how: dict[str, Any] = options | {"chunk": chunk, "sinks_KG": sinks_KG}
        out_TKGh, kv = attend(q_TKGh, k_TKh, v_TKh, kv, plain, **how)
        return _look_ahead(lambda: q_TKGh, out_TKGh, kv, batch, **how), kv
    if chunk is not None:
        body = functools.partial(BACKENDS["xla"], **options, chunk=chunk)
        return _per_device(body, (q_TKGh, k_TKh, v_TKh), (), kv, batch, sinks_KG)
    forced = _forced.get()
    for name, body in BACKENDS.items():
        if name != forced if forced is not None else name == "pallas_gpu" and kv.platform != "gpu":
            continue  # that one would run anywhere, interpreted
        try:
            return _per_device(functools.partial(body, **options), (q_TKGh, k_TKh, v_TKh), (), kv, batch, sinks_KG)
        except NotImplementedError:
            if forced is not None:
                raise
    raise AssertionError("the xla backend declined")


def attend_rope(
    qkv_TKgh: jax.Array,
    positions_T: jax.Array,
    rotary: tuple[np.ndarray, float] | None,
    kv: KVPages,
    batch: AttentionBatch | Sequences,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_KG: jax.Array | None = None,
    bias_Kh: jax.Array | None = None,
) -> tuple[jax.Array, KVPages]:
    """`attend` on a fused projection, rotating q and k by the tokens' positions; one kernel where there is one for it.

    Args:
        qkv_TKgh: [T, K, G + 2, h]: a KV head's G queries, then its k, then its v.
        positions_T: what q and k are rotated by; see `ops.rope.rope`.
        rotary: (inv_freq, factor) as `ops.rope.inverse_frequencies` gives, channels paired (i, i + r / 2); None when
            q and k are rotated already or never are.
        kv, batch, scale, window, softcap, sinks_KG: as in `attend`.
        bias_Kh: what the projection has added to every k. Pages of 8 bits do without what stands still of it (mixing.py).
    Returns:
        As `attend`.
    """
    if bias_Kh is not None and isinstance(batch, AttentionBatch) and kv.mixed and sinks_KG is None and softcap is None:
        qkv_TKgh = mixing.without_constant(qkv_TKgh, bias_Kh, positions_T, rotary)
    if isinstance(batch, AttentionBatch) and qkv_TKgh.shape[-1] < kv.spec.head_dim:
        wide = _filled(qkv_TKgh, kv.spec.head_dim)
        how: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sinks_KG": sinks_KG}
        out_TKGh, kv = attend_rope(wide, positions_T, rotary, kv, batch, **how)
        return out_TKGh[..., : qkv_TKgh.shape[-1]], kv
    if isinstance(batch, AttentionBatch) and batch.chunk_ahead_C is not None:
        plain = dataclasses.replace(batch, chunk_ahead_C=None)
        how = {"scale": scale, "window": window, "softcap": softcap, "sinks_KG": sinks_KG}
        out_TKGh, kv = attend_rope(qkv_TKgh, positions_T, rotary, kv, plain, **how)

        def queries() -> jax.Array:
            return qkv_TKgh[:, :, :-2] if rotary is None else rope(qkv_TKgh[:, :, :-2], positions_T, *rotary)

        return _look_ahead(queries, out_TKGh, kv, batch, **how), kv
    if isinstance(batch, Sequences):
        q_TKGh, k_TKh, v_TKh = sequences.split_rotated(qkv_TKgh, positions_T, rotary, batch.segments_BS.shape[1])
        return attend(q_TKGh, k_TKh, v_TKh, kv, batch, scale=scale, window=window, softcap=softcap, sinks_KG=sinks_KG)
    if _forced.get() in (None, "native"):
        run = functools.partial(native.attend_rope, scale=scale, window=window, softcap=softcap)
        angles = () if rotary is None else cos_sin(positions_T, *rotary)
        with contextlib.suppress(NotImplementedError):
            return _per_device(run, (qkv_TKgh,), angles, kv, batch, sinks_KG)
    q_TKGh, k_TKh, v_TKh = qkv_TKgh[:, :, :-2], qkv_TKgh[:, :, -2], qkv_TKgh[:, :, -1]
    if rotary is not None:
        q_TKGh, k_TKh = (rope(x, positions_T, *rotary) for x in (q_TKGh, k_TKh))
    return attend(q_TKGh, k_TKh, v_TKh, kv, batch, scale=scale, window=window, softcap=softcap, sinks_KG=sinks_KG)


def _filled(x: jax.Array, width: int) -> jax.Array:
    """Heads of another size, zeros behind."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def _look_ahead(
    queries: Callable[[], jax.Array],
    out_TKGh: jax.Array,
    kv: KVPages,
    batch: AttentionBatch,
    *,
    sinks_KG: jax.Array | None,
    **options: Any,
) -> jax.Array:
    """What causal attention gave, with chunk tokens that attend to later ones made anew. Only the plain XLA body does that, and it
    runs in steps that have such tokens: prompts without images cost what they cost any model."""
    first = batch.num_decode_tokens
    chunk = dataclasses.replace(
        batch,
        kv_index_T=batch.kv_index_T[first:],
        decode_pages_BP=batch.decode_pages_BP[:0],
        decode_len_B=batch.decode_len_B[:0],
        decode_qlen_B=None,
    )

    def anew() -> jax.Array:
        body = functools.partial(BACKENDS["xla"], **({"chunk": None} | options))
        out_CKGh, _ = _per_device(body, (queries()[first:], None, None), (), kv, chunk, sinks_KG)
        return out_TKGh.at[first:].set(out_CKGh.astype(out_TKGh.dtype))

    assert batch.chunk_ahead_C is not None
    return jax.lax.cond(jnp.any(batch.chunk_ahead_C > 0), anew, lambda: out_TKGh)


def _per_device(
    run: Callable[..., tuple[jax.Array, KVPages]],
    tokens: tuple[jax.Array | None, ...],
    angles: tuple[jax.Array, ...],
    kv: KVPages,
    batch: AttentionBatch,
    sinks_KG: jax.Array | None,
):
    """Each device attends with its own KV heads, or with all when they are not split, and a replica with its own pages: no
    communication either way. Of an array with parts it sees its own."""
    run = shared.around(run)
    if kv.mesh is None:
        return run(*tokens, *angles, kv, batch, sinks_KG=sinks_KG)
    heads = PartitionSpec(None, _pages.MODEL_AXIS) if kv.sharded else PartitionSpec()
    sinks = PartitionSpec(_pages.MODEL_AXIS) if kv.sharded else PartitionSpec()
    return per_device(
        lambda tokens, angles, kv, batch, sinks: run(*tokens, *angles, kv, batch, sinks_KG=sinks),
        kv.mesh,
        in_specs=(heads, PartitionSpec(), heads, PartitionSpec(), sinks),
        out_specs=(heads, heads),
    )(tokens, angles, kv, batch, sinks_KG)
