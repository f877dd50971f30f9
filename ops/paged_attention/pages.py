"""One layer's K and V in pages: how they lie in memory, how tokens get in and pages get out.

Three layouts. `rows` keeps each token's K together, `[page, K, page_size, h]`, and is what plain XLA reads. `panels` is
what the CPU's native kernels read: K is turned so that a vector register holds one channel of neighbouring tokens, and
both K and V are ready-packed right-hand sides of a matrix product, so attention reads a page where it lies:

    float32    k [page, K, h, page_size]          v [page, K, page_size, h]
    bfloat16   k [page, K, h / 2, page_size, 2]   v [page, K, page_size / 2, h, 2]   (for instructions on pairs)
    int8       k [page, K, h / 4, page_size, 4]   v [page, K, page_size / 4, h, 4]   (for instructions on fours)

int8 pages carry one float32 scale a token and head, `[page, K, page_size]`; their heads are mixed (see mixing.py).

`lanes` is what the TPU's kernels read: one array `[page, K, page_size, L]` with a token's K and V side by side. A TPU
pads the last axis of everything to 128 lanes, so two heads of 64 share what each would have had to itself; wider ones
start at a multiple of 128. `v` is then None, and `k_scale` holds both scales, `[page, K, 2, page_size]`.

In an array that layers of several kinds share (shared.py) rows are cut into *units* of as many lanes as all kinds' rows are
multiples of, so that the last two axes, which a TPU lays out in tiles, are the same for all; a row of several units has one
behind all heads' of the one before: `[page, units * K, page_size, unit]`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ops import native
from ops.paged_attention.batch import KVSpec

Layout = Literal["rows", "panels", "lanes"]
MODEL_AXIS = "model"
"""The mesh axis over which KV heads are split, when it divides them."""
DATA_AXIS = "data"
"""The mesh axis over which pages are split: each replica has as many, and page tables count them within it."""

_DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e5m2")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "k_scale", "v_scale", "kind_scales"],
    meta_fields=["spec", "page_size", "layout", "platform", "mesh", "part"],
)
@dataclasses.dataclass(frozen=True)
class KVPages:
    """One layer's pages. Opaque to models and engine: only ops/paged_attention looks inside.

    `v` is None when the layer keeps one latent for K and V (KVSpec.v_head_dim == 0), and in lanes. Scales are None unless
    int8, and where layers of several kinds share the array: then each of `spec.kinds` has its own in `kind_scales`, with the
    heads of all parts behind each other. `part`: what the array holds, and which part of a page this layer's is; None for all.
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
    kind_scales: tuple[tuple[jax.Array | None, jax.Array | None], ...] = ()
    part: tuple[KVSpec, int] | None = None

    @property
    def num_pages(self) -> int:
        """Pages, null pages included: all replicas', or, in what a replica runs, its own."""
        return self.k.shape[0]

    @property
    def mixed(self) -> bool:
        """Whether they hold k and v as mixing.py makes them: those of 8 bits but latents."""
        return self.k.dtype == jnp.int8 and self.spec.v_head_dim > 0 and not self.spec.indexed

    @property
    def sharded(self) -> bool:
        """Whether KV heads are split over the mesh's model axis."""
        return self.mesh is not None and _head_axis(self._array, self.mesh) is not None

    @property
    def placement(self) -> jax.sharding.PartitionSpec:
        """How the first axes of each array, pages and KV heads, are split over the mesh."""
        return _placement(self._array, self.mesh)

    @property
    def _array(self) -> KVSpec:
        return self.spec if self.part is None else self.part[0]


def _head_axis(spec: KVSpec, mesh: jax.sharding.Mesh) -> str | None:
    size = mesh.shape.get(MODEL_AXIS, 1)
    divides = all(kind.num_kv_heads % size == 0 for kind in (spec, *spec.kinds))
    return MODEL_AXIS if size > 1 and divides else None


def _placement(spec: KVSpec, mesh: jax.sharding.Mesh | None) -> jax.sharding.PartitionSpec:
    if mesh is None:
        return jax.sharding.PartitionSpec()
    pages = DATA_AXIS if mesh.shape.get(DATA_AXIS, 1) > 1 else None
    return jax.sharding.PartitionSpec(pages, _head_axis(spec, mesh))


def _shapes(
    spec: KVSpec, num_pages: int, page_size: int, dtype: np.dtype, layout: Layout
) -> dict[str, tuple[tuple[int, ...], np.dtype] | None]:
    """Shape and dtype of each array of a KVPages."""
    K, h, hv = spec.num_kv_heads, spec.head_dim, spec.v_head_dim
    scaled = dtype == np.int8 and not spec.kinds
    if layout == "lanes":
        scale = (num_pages, K, 2 if hv else 1, page_size), np.dtype(np.float32)
        units, lanes = _lane_units(spec)
        return {
            "k": ((num_pages, units, page_size, lanes), dtype),
            "v": None,
            "k_scale": scale if scaled else None,
            "v_scale": None,
        }
    k, v = (num_pages, K, page_size, h), (num_pages, K, page_size, hv)
    if layout == "panels":
        k = (num_pages, K, h, page_size)
        if dtype.itemsize < 4:
            n = 4 // dtype.itemsize
            k, v = (num_pages, K, h // n, page_size, n), (num_pages, K, page_size // n, hv, n)
    scale = ((num_pages, K, page_size), np.dtype(np.float32)) if scaled else None
    return {"k": (k, dtype), "v": (v, dtype) if hv else None, "k_scale": scale, "v_scale": scale if hv else None}


def _kind_scale_shapes(
    spec: KVSpec, num_pages: int, page_size: int, dtype: np.dtype, layout: Layout
) -> list[list[tuple[tuple[int, ...], np.dtype] | None]]:
    """Of each kind, of its K's scales and of its V's, as in `_shapes`."""
    if dtype != np.int8:
        return []
    found = []
    for kind in spec.kinds:
        heads = dataclasses.replace(kind, num_kv_heads=kind.num_kv_heads * spec.parts_of(kind))
        shapes = _shapes(heads, num_pages, page_size, dtype, layout)
        found.append([shapes["k_scale"], shapes["v_scale"]])
    return found


def _lane_units(spec: KVSpec) -> tuple[int, int]:
    """(units a page, lanes of each) in lanes: K rows of its lanes where all layers are alike."""
    if not spec.kinds:
        return spec.num_kv_heads, lane_layout(spec).width
    lanes = math.gcd(*(lane_layout(kind).width for kind in spec.kinds))
    heads = [(kind.num_kv_heads * spec.parts_of(kind), lane_layout(kind).width // lanes) for kind in spec.kinds]
    units = max(count * units for count, units in heads)
    whole = math.lcm(*(count for count, _ in heads))  # each part as many, and each device of a mesh
    return -(-units // whole) * whole, lanes


def parts_shape(kv: KVPages, own: KVSpec, parts: int, keys: bool) -> tuple[int, ...]:
    """K, or V, of a device's part of an array as `parts` times as many pages of another kind, `own`, with the heads that it has
    there."""
    pages, rows, *rest = kv.k.shape
    if kv.layout == "lanes":
        return (pages * parts, rows // parts, *rest)
    found = _shapes(own, pages * parts, kv.page_size, np.dtype(kv.k.dtype), kv.layout)["k" if keys else "v"]
    assert found is not None
    return found[0]


@dataclasses.dataclass(frozen=True)
class LaneLayout:
    """Where K and V are in a row of a page in lanes.

    Attributes:
        width: L, a multiple of 128.
        v_first: lane at which V begins; 0 when K is V too.
        k_slice, v_slice: (first, past the last) whole lanes that hold K, and V.
    """

    width: int
    v_first: int
    k_slice: tuple[int, int]
    v_slice: tuple[int, int]


LANES = 128


def lane_layout(spec: KVSpec) -> LaneLayout:
    """K and V share 128 lanes when they fit, else each begins at a multiple of 128."""
    h, hv = spec.head_dim, spec.v_head_dim
    k_width = -(-h // LANES) * LANES
    if hv == 0:
        return LaneLayout(k_width, 0, (0, k_width), (0, k_width))
    if h + hv <= LANES:
        return LaneLayout(LANES, h, (0, LANES), (0, LANES))
    width = k_width + -(-hv // LANES) * LANES
    return LaneLayout(width, k_width, (0, k_width), (k_width, width))


def join_lanes(spec: KVSpec, k: jax.Array, v: jax.Array | None, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[..., h] and [..., hv] as rows of a page in lanes, [..., L], zeros between."""
    lanes = lane_layout(spec)
    k = _cast(k, dtype)
    parts = [k] if v is None else [_pad_last(k, lanes.v_first), _cast(v, dtype)]
    return _pad_last(parts[0] if v is None else jnp.concatenate(parts, axis=-1), lanes.width)


def in_units(rows: jax.Array, lanes: int) -> jax.Array:
    """[..., K, L] rows as they lie in an array of units of so many lanes, [..., units * K, lanes]."""
    if rows.shape[-1] == lanes:
        return rows
    *front, K, _ = rows.shape
    return jnp.moveaxis(rows.reshape(*front, K, -1, lanes), -2, -3).reshape(*front, -1, lanes)


def _pad_last(x: jax.Array, width: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def bytes_per_page(spec: KVSpec, page_size: int, dtype: jax.typing.DTypeLike, layout: Layout = "rows") -> int:
    """Bytes that one page of one layer takes, over all devices together; only lanes may take more than the others."""
    shapes = list(_shapes(spec, 1, page_size, np.dtype(dtype), layout).values())
    shapes += itertools.chain(*_kind_scale_shapes(spec, 1, page_size, np.dtype(dtype), layout))
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
        sharding = jax.sharding.NamedSharding(mesh, _placement(spec, mesh))
    total = num_pages * (1 if mesh is None else mesh.shape.get(DATA_AXIS, 1))
    # Native kernels read these pages, and so there are native zeros, which take memory when a page is first used.
    lazy = layout == "panels" and mesh is None
    zeros = native.zeros if lazy else functools.partial(jnp.zeros, device=sharding)
    arrays: dict[str, Any] = {
        name: None if shape is None else zeros(shape[0], shape[1])
        for name, shape in _shapes(spec, total, page_size, dtype, layout).items()
    }
    scales: Any = tuple(
        tuple(None if shape is None else zeros(shape[0], shape[1]) for shape in shapes)
        for shapes in _kind_scale_shapes(spec, total, page_size, dtype, layout)
    )
    return KVPages(
        **arrays,
        spec=spec,
        page_size=page_size,
        layout=layout,
        platform=platform_of(mesh),
        mesh=mesh,
        kind_scales=scales,
    )


def platform_of(mesh: jax.sharding.Mesh | None) -> str:
    """The platform of a mesh's devices, or of the default one."""
    return mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()


def write(kv: KVPages, k_TKh: jax.Array, v_TKh: jax.Array | None, index_T: jax.Array) -> KVPages:
    """Puts tokens' K and V at `index = page * page_size + offset`; an index out of range is dropped.

    One scatter an array, in place when the pages are donated.
    """
    page_T, slot_T = index_T // kv.page_size, index_T % kv.page_size
    narrow = jnp.issubdtype(kv.k.dtype, jnp.floating) and kv.k.dtype.itemsize < 4
    if narrow and kv.platform == "cpu" and kv.layout != "lanes":
        return _write_each(kv, k_TKh, v_TKh, index_T)
    new = {}
    if kv.layout == "lanes":
        if kv.k_scale is not None:
            k_TKh, scale_TK = quantize_int8(k_TKh)
            scales = [scale_TK]
            if v_TKh is not None:
                v_TKh, scale_TK = quantize_int8(v_TKh)
                scales.append(scale_TK)
            new["k_scale"] = kv.k_scale.at[page_T, :, :, slot_T].set(jnp.stack(scales, axis=-1), mode="drop")
        rows_TUL = in_units(join_lanes(kv.spec, k_TKh, v_TKh, kv.k.dtype), kv.k.shape[-1])
        k = kv.k.at[page_T, : rows_TUL.shape[1], slot_T].set(rows_TUL, mode="drop")
        return dataclasses.replace(kv, k=k, **new)
    k_TKh, new["k_scale"] = _quantize(k_TKh, kv.k, kv.k_scale, page_T, slot_T)
    if kv.layout == "rows":
        new["k"] = kv.k.at[page_T, :, slot_T].set(k_TKh, mode="drop")
    elif kv.k.ndim == 5:
        together = k_TKh.reshape(*k_TKh.shape[:2], -1, kv.k.shape[-1])
        new["k"] = kv.k.at[page_T, :, :, slot_T].set(together, mode="drop")
    else:
        new["k"] = kv.k.at[page_T, :, :, slot_T].set(k_TKh, mode="drop")
    if kv.v is not None:
        assert v_TKh is not None
        v_TKh, new["v_scale"] = _quantize(v_TKh, kv.v, kv.v_scale, page_T, slot_T)
        if kv.layout == "panels" and kv.v.ndim == 5:
            n = kv.v.shape[-1]
            new["v"] = kv.v.at[page_T, :, slot_T // n, :, slot_T % n].set(v_TKh, mode="drop")
        else:
            new["v"] = kv.v.at[page_T, :, slot_T].set(v_TKh, mode="drop")
    return dataclasses.replace(kv, **new)


def _write_each(kv: KVPages, k_TKh: jax.Array, v_TKh: jax.Array | None, index_T: jax.Array) -> KVPages:
    """`write` token by token: XLA's CPU scatter of a narrow float turns all pages into float32 and back."""
    index_T = jnp.where((index_T >= 0) & (index_T < kv.num_pages * kv.page_size), index_T, 0)
    page_T, slot_T = index_T // kv.page_size, index_T % kv.page_size
    k_T, v_T = _cast(k_TKh, kv.k.dtype), None if v_TKh is None else _cast(v_TKh, kv.k.dtype)
    zero = jnp.zeros((), jnp.int32)

    def put(token: jax.Array, arrays: tuple[jax.Array, jax.Array | None]):
        k, v = arrays
        page, slot, new = page_T[token], slot_T[token], k_T[token]
        if kv.layout == "rows":
            k = jax.lax.dynamic_update_slice(k, new[None, :, None], (page, zero, slot, zero))
        else:
            pairs = new.reshape(1, new.shape[0], -1, 1, 2)
            k = jax.lax.dynamic_update_slice(k, pairs, (page, zero, zero, slot, zero))
        if v is not None and v_T is not None:
            new = v_T[token]
            if kv.layout == "rows":
                v = jax.lax.dynamic_update_slice(v, new[None, :, None], (page, zero, slot, zero))
            else:
                v = jax.lax.dynamic_update_slice(
                    v, new[None, :, None, :, None], (page, zero, slot // 2, zero, slot % 2)
                )
        return k, v

    k, v = jax.lax.fori_loop(0, index_T.shape[0], put, (kv.k, kv.v))
    return dataclasses.replace(kv, k=k, v=v)


def _quantize(x_TKh: jax.Array, pages: jax.Array, scales: jax.Array | None, page_T: jax.Array, slot_T: jax.Array):
    """Tokens in the pages' dtype, and the updated scales (None when the dtype needs none)."""
    if scales is None:
        return _cast(x_TKh, pages.dtype), None
    values, scale_TK = quantize_int8(x_TKh)
    return values, scales.at[page_T, :, slot_T].set(scale_TK, mode="drop")


def _cast(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`x` in another float dtype; what is beyond a narrow one's range becomes its largest."""
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1:
        limit = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -limit, limit)  # a cast beyond e4m3's range gives NaN
    return x.astype(dtype)


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
    if kv.layout == "lanes":
        return _read_lanes(kv, pages, dtype)
    k = _rows(kv.k[pages], kv.layout, keys=True).astype(dtype)
    if kv.k_scale is not None:
        k = k * kv.k_scale[pages][..., None].astype(dtype)
    if kv.v is None:
        return k, k
    v = _rows(kv.v[pages], kv.layout, keys=False).astype(dtype)
    if kv.v_scale is not None:
        v = v * kv.v_scale[pages][..., None].astype(dtype)
    return k, v


def read_tokens(kv: KVPages, index: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Gathers K of single tokens, [..., K, h] as `dtype`; not of pages in panels.

    Args:
        index: [...] int32, page * page_size + offset, all in range.
    """
    assert kv.layout != "panels", "a page in panels has a token's numbers apart"
    page, slot = index // kv.page_size, index % kv.page_size
    k = kv.k[page, :, slot].astype(dtype)[..., : kv.spec.head_dim]
    if kv.k_scale is None:
        return k
    scale = kv.k_scale[page, :, 0, slot] if kv.layout == "lanes" else kv.k_scale[page, :, slot]
    return k * scale[..., None].astype(dtype)


def _read_lanes(kv: KVPages, pages: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    lanes = lane_layout(kv.spec)
    rows = kv.k[pages].astype(dtype)
    units = lanes.width // rows.shape[-1]
    heads = min(kv.spec.num_kv_heads, rows.shape[-3] // units)
    if units * heads < rows.shape[-3] or units > 1:
        *front, _, size, width = rows.shape
        rows = rows[..., : units * heads, :, :].reshape(*front, units, heads, size, width)
        rows = jnp.moveaxis(rows, -4, -2).reshape(*front, heads, size, -1)
    k, v = rows[..., : kv.spec.head_dim], rows[..., lanes.v_first : lanes.v_first + kv.spec.v_head_dim]
    if kv.k_scale is not None:
        scales = kv.k_scale[pages].astype(dtype)
        k, v = k * scales[..., 0, :, None], v * scales[..., -1, :, None]
    return k, v if kv.spec.v_head_dim else k


def _rows(pages: jax.Array, layout: Layout, keys: bool) -> jax.Array:
    """[..., K, page_size, h] of gathered pages."""
    if layout == "rows":
        return pages
    if pages.dtype.itemsize < 4 and keys:
        pages = jnp.moveaxis(pages, -2, -3)
        return pages.reshape(*pages.shape[:-2], -1)
    if pages.dtype.itemsize < 4:
        pages = jnp.moveaxis(pages, -1, -2)
        return pages.reshape(*pages.shape[:-3], -1, pages.shape[-1])
    return jnp.swapaxes(pages, -1, -2) if keys else pages
