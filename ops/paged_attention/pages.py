"""One layer's K and V in pages: how they lie in memory, how tokens get in and pages get out.

Two layouts. `rows` keeps each token's K together, `[page, K, page_size, h]`, and is what plain XLA reads. `panels` is
what the CPU's native kernels read: K is turned so that a vector register holds one channel of neighbouring tokens, and
both K and V are ready-packed right-hand sides of a matrix product, so attention reads a page where it lies:

    float32, int8   k [page, K, h, page_size]         v [page, K, page_size, h]
    bfloat16        k [page, K, h / 2, page_size, 2]   v [page, K, page_size / 2, h, 2]   (pairs for the bf16 dot)

int8 pages carry one float32 scale a token and head, `[page, K, page_size]`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ops.paged_attention.batch import KVSpec

Layout = Literal["rows", "panels"]
MODEL_AXIS = "model"
"""The mesh axis over which KV heads are split, when it divides them."""

_DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e5m2")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "k_scale", "v_scale"],
    meta_fields=["spec", "page_size", "layout", "platform", "mesh"],
)
@dataclasses.dataclass(frozen=True)
class KVPages:
    """One layer's pages. Opaque to models and engine: only ops/paged_attention looks inside.

    `v` is None when the layer keeps one latent for K and V (KVSpec.v_head_dim == 0). Scales are None unless int8.
    """

    k: jax.Array
    v: jax.Array | None
    k_scale: jax.Array | None
    v_scale: jax.Array | None
    spec: KVSpec
    page_size: int
    layout: Layout
    platform: str
    mesh: jax.sharding.Mesh | None

    @property
    def num_pages(self) -> int:
        """Pages, the null page included."""
        return self.k.shape[0]

    @property
    def sharded(self) -> bool:
        """Whether KV heads are split over the mesh's model axis."""
        return self.mesh is not None and _head_axis(self.spec, self.mesh) is not None


def _head_axis(spec: KVSpec, mesh: jax.sharding.Mesh) -> str | None:
    size = mesh.shape.get(MODEL_AXIS, 1)
    return MODEL_AXIS if size > 1 and spec.num_kv_heads % size == 0 else None


def _shapes(
    spec: KVSpec, num_pages: int, page_size: int, dtype: np.dtype, layout: Layout
) -> dict[str, tuple[tuple[int, ...], np.dtype] | None]:
    """Shape and dtype of each array of a KVPages."""
    K, h, hv = spec.num_kv_heads, spec.head_dim, spec.v_head_dim
    k, v = (num_pages, K, page_size, h), (num_pages, K, page_size, hv)
    if layout == "panels":
        k = (num_pages, K, h, page_size)
        if dtype == jnp.bfloat16:
            k, v = (num_pages, K, h // 2, page_size, 2), (num_pages, K, page_size // 2, hv, 2)
    scale = ((num_pages, K, page_size), np.dtype(np.float32)) if dtype == np.int8 else None
    return {"k": (k, dtype), "v": (v, dtype) if hv else None, "k_scale": scale, "v_scale": scale if hv else None}


def bytes_per_page(spec: KVSpec, page_size: int, dtype: jax.typing.DTypeLike) -> int:
    """Bytes that one page of one layer takes, over all devices together; every layout takes the same."""
    shapes = _shapes(spec, 1, page_size, np.dtype(dtype), "rows").values()
    return sum(int(np.prod(shape)) * kind.itemsize for shape, kind in filter(None, shapes))


def allocate(
    spec: KVSpec,
    num_pages: int,
    page_size: int,
    dtype: jax.typing.DTypeLike,
    mesh: jax.sharding.Mesh | None,
    layout: Layout,
) -> KVPages:
    """Zeroed pages in the given layout; see ops.paged_attention.allocate for the rest."""
    dtype = np.dtype(dtype)
    if dtype.name not in _DTYPES:
        raise ValueError(f"KV pages cannot be {dtype.name}; choose one of {', '.join(_DTYPES)}.")
    if num_pages < 2 or page_size < 1:
        raise ValueError(
            "A KV cache needs at least 2 pages (page 0 is never read) of at least 1 token, "
            f"got {num_pages} pages of {page_size}."
        )
    sharding = None
    if mesh is not None:
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, _head_axis(spec, mesh)))
    arrays: dict[str, Any] = {
        name: None if shape is None else jnp.zeros(shape[0], shape[1], device=sharding)
        for name, shape in _shapes(spec, num_pages, page_size, dtype, layout).items()
    }
    platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    return KVPages(**arrays, spec=spec, page_size=page_size, layout=layout, platform=platform, mesh=mesh)


def write(kv: KVPages, k_TKh: jax.Array, v_TKh: jax.Array | None, index_T: jax.Array) -> KVPages:
    """Puts tokens' K and V at `index = page * page_size + offset`; an index out of range is dropped.

    One scatter an array, in place when the pages are donated.
    """
    page_T, slot_T = index_T // kv.page_size, index_T % kv.page_size
    new = {}
    k_TKh, new["k_scale"] = _quantize(k_TKh, kv.k, kv.k_scale, page_T, slot_T)
    if kv.layout == "rows":
        new["k"] = kv.k.at[page_T, :, slot_T].set(k_TKh, mode="drop")
    elif kv.k.ndim == 5:
        pairs = k_TKh.reshape(*k_TKh.shape[:2], -1, 2)
        new["k"] = kv.k.at[page_T, :, :, slot_T].set(pairs, mode="drop")
    else:
        new["k"] = kv.k.at[page_T, :, :, slot_T].set(k_TKh, mode="drop")
    if kv.v is not None:
        assert v_TKh is not None
        v_TKh, new["v_scale"] = _quantize(v_TKh, kv.v, kv.v_scale, page_T, slot_T)
        if kv.layout == "panels" and kv.v.ndim == 5:
            new["v"] = kv.v.at[page_T, :, slot_T // 2, :, slot_T % 2].set(v_TKh, mode="drop")
        else:
            new["v"] = kv.v.at[page_T, :, slot_T].set(v_TKh, mode="drop")
    return dataclasses.replace(kv, **new)


def _quantize(x_TKh, pages, scales, page_T, slot_T):
    """Tokens in the pages' dtype, and the updated scales (None when the dtype needs none)."""
    if scales is None:
        if jnp.issubdtype(pages.dtype, jnp.floating) and pages.dtype.itemsize == 1:
            limit = float(jnp.finfo(pages.dtype).max)
            x_TKh = jnp.clip(x_TKh, -limit, limit)  # a cast beyond e4m3's range gives NaN
        return x_TKh.astype(pages.dtype), None
    values, scale_TK = quantize_int8(x_TKh)
    return values, scales.at[page_T, :, slot_T].set(scale_TK, mode="drop")


def quantize_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Symmetric int8 over the last axis: (int8 like x, float32 scale without the last axis)."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) * (1.0 / 127.0)
    values = jnp.round(x / jnp.where(scale == 0.0, 1.0, scale)[..., None])
    return values.astype(jnp.int8), scale


def read(kv: KVPages, pages: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Gathers pages, whatever their layout: k [..., K, page_size, h] and v likewise, as `dtype`.

    Args:
        pages: [...] int32 page ids, all in range.
    """
    k = _rows(kv.k[pages], kv.layout, keys=True).astype(dtype)
    if kv.k_scale is not None:
        k = k * kv.k_scale[pages][..., None].astype(dtype)
    if kv.v is None:
        return k, k
    v = _rows(kv.v[pages], kv.layout, keys=False).astype(dtype)
    if kv.v_scale is not None:
        v = v * kv.v_scale[pages][..., None].astype(dtype)
    return k, v


def _rows(pages: jax.Array, layout: Layout, keys: bool) -> jax.Array:
    """[..., K, page_size, h] of gathered pages."""
    if layout == "rows":
        return pages
    if pages.dtype == jnp.bfloat16 and keys:
        pages = jnp.moveaxis(pages, -2, -3)
        return pages.reshape(*pages.shape[:-2], -1)
    if pages.dtype == jnp.bfloat16:
        pages = jnp.moveaxis(pages, -1, -2)
        return pages.reshape(*pages.shape[:-3], -1, pages.shape[-1])
    return jnp.swapaxes(pages, -1, -2) if keys else pages
