"""One array of pages for layers that keep different numbers of a position.

A page holds a span of one layer of the kind that keeps most, or of several of another kind: its *parts*, one behind the other.
K of a page is so many numbers in a row, whatever their shape, and so is V; to a layer that keeps half as many, the array is one
of twice as many pages, of which it has every second one. The array is shaped anew for it, which moves nothing where a page lies
in a row, and the page table's numbers are changed accordingly. So page ids, and all that goes by them (who holds a page, prefixes,
the host's copies, transfers), know nothing of kinds.

The scales of 8-bit pages are one a token and head, and heads of different sizes have different numbers of them: each kind has
its own (`KVPages.kind_scales`).

Parts are laid out by each device of a mesh's `model` axis for the heads that it has. So the same page lies otherwise where heads
are cut over another number of devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from ops.paged_attention.batch import AttentionBatch, KVSpec
from ops.paged_attention.pages import MODEL_AXIS, KVPages, parts_shape


def of_layer(kv: KVPages, spec: KVSpec, part: int) -> KVPages:
    """An array's pages as one layer's: of what it keeps, and which part of a page is its."""
    if not kv.spec.kinds:
        return kv
    return dataclasses.replace(kv, spec=kv.spec.kind_of(spec), part=(kv.spec, part))


def of_array(kv: KVPages) -> KVPages:
    """What `of_layer` was given, with the arrays that there are now."""
    return kv if kv.part is None else dataclasses.replace(kv, spec=kv.part[0], part=None)


def around(body: Callable[..., tuple[jax.Array, KVPages]]) -> Callable[..., tuple[jax.Array, KVPages]]:
    """A body of `attend` that knows nothing of parts, for a layer that has a part of its pages. On each device's own heads."""

    def attend(*operands: Any, **options: Any) -> tuple[jax.Array, KVPages]:
        *tokens, kv, batch = operands
        if kv.part is None:
            return body(*operands, **options)
        out, after = body(*tokens, _opened(kv), _batch_of(kv, batch), **options)
        return out, _closed(kv, after)

    return attend


def _opened(kv: KVPages) -> KVPages:
    """The pages as if the layer had them to itself: part i of page p is page p * parts + i."""
    assert kv.part is not None
    array, parts = kv.part[0], _parts(kv)
    shards = kv.mesh.shape[MODEL_AXIS] if kv.mesh is not None and kv.sharded else 1
    own = dataclasses.replace(kv.spec, num_kv_heads=kv.spec.num_kv_heads // shards)
    k_scale, v_scale = kv.kind_scales[array.kinds.index(kv.spec)] if kv.kind_scales else (None, None)
    return dataclasses.replace(
        kv,
        k=kv.k.reshape(parts_shape(kv, own, parts, keys=True)),
        v=None if kv.v is None else kv.v.reshape(parts_shape(kv, own, parts, keys=False)),
        k_scale=_split(k_scale, parts),
        v_scale=_split(v_scale, parts),
        kind_scales=(),
        spec=own,
        part=None,
    )


def _parts(kv: KVPages) -> int:
    assert kv.part is not None
    return kv.part[0].parts_of(kv.spec)


def _split(scale: jax.Array | None, parts: int) -> jax.Array | None:
    if scale is None:
        return None
    return scale.reshape(scale.shape[0] * parts, scale.shape[1] // parts, *scale.shape[2:])


def _closed(kv: KVPages, after: KVPages) -> KVPages:
    """The array again, with what a layer has written."""
    assert kv.part is not None
    scales = list(kv.kind_scales)
    if scales:
        own = kv.part[0].kinds.index(kv.spec)
        k_scale, v_scale = scales[own]
        scales[own] = _joined(after.k_scale, k_scale), _joined(after.v_scale, v_scale)
    k, v = after.k.reshape(kv.k.shape), _joined(after.v, kv.v)
    return dataclasses.replace(kv, k=k, v=v, kind_scales=tuple(scales))


def _joined(after: jax.Array | None, before: jax.Array | None) -> jax.Array | None:
    return None if after is None or before is None else after.reshape(before.shape)


def _batch_of(kv: KVPages, batch: AttentionBatch) -> AttentionBatch:
    """Page tables and places of tokens among the parts; what is of no page stays in the null page."""
    assert kv.part is not None
    (_, own), parts, size = kv.part, _parts(kv), kv.page_size

    def part(page: jax.Array) -> jax.Array:
        return page * parts + own

    return dataclasses.replace(
        batch,
        kv_index_T=part(batch.kv_index_T // size) * size + batch.kv_index_T % size,
        decode_pages_BP=part(batch.decode_pages_BP),
        chunk_pages_RP=part(batch.chunk_pages_RP),
    )
