"""Layers of two kinds in one array of pages: each finds what it would in pages of its own."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import native, paged_attention
from ops.paged_attention import AttentionBatch, KVGroups, KVSpec, array_pages, layer_pages
from ops.paged_attention.cases import Case, make_arguments

LENGTHS = (40, 17)  # tokens of each request's piece
BODIES = [
    ("native", "float32", (4, 32), (1, 64), 16),
    ("native", "bfloat16", (2, 16), (1, 16), 16),
    ("native", "int8", (4, 32), (1, 64), 16),
    ("xla", "int8", (4, 32), (1, 64), 8),
    *(
        pytest.param(body, marks=pytest.mark.slow)
        for body in (
            ("xla", "float32", (4, 32), (1, 64), 8),
            ("pallas_tpu", "float32", (4, 128), (1, 256), 8),  # a row of two units
            ("pallas_tpu", "float32", (4, 32), (1, 64), 8),  # two parts of fewer rows than half a page has
        )
    ),
]
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def steps_of(spec: KVSpec, size: int, first: int, decode: bool):
    """Two pieces of two prompts, then perhaps a token of each, in pages from `first` on: (batch, q, k, v) each."""
    case = Case(spec.num_kv_heads, 2, spec.head_dim, page_size=size, chunks=tuple((0, n) for n in LENGTHS))
    batch = make_arguments(case).batch
    pages_RP = (first + np.arange(2 * 12, dtype=np.int32)).reshape(2, 12)
    lengths, T = np.array(LENGTHS, np.int32), len(batch.kv_index_T)

    def index(row, positions):
        return pages_RP[row, positions // size] * size + positions % size

    def piece(number):
        where = np.zeros(T, np.int32)
        for row, n in enumerate(LENGTHS):
            start = batch.chunk_start_R[row]
            where[start : start + n] = index(row, number * n + np.arange(n))
        return dataclasses.replace(batch, kv_index_T=where, chunk_pages_RP=pages_RP, chunk_len_R=(number + 1) * lengths)

    none = np.zeros(0, np.int32)
    where = np.array([index(row, 2 * n) for row, n in enumerate(LENGTHS)], np.int32)
    tokens = AttentionBatch(where, pages_RP, 2 * lengths + 1, none.reshape(0, 12), none, none, none, none)
    rng = np.random.default_rng(first)
    K, h = spec.num_kv_heads, spec.head_dim
    return [
        (batch, *(rng.standard_normal((n, K, *more, h)).astype(np.float32) for more in ((2,), (), ())))
        for batch, n in ((piece(0), T), (piece(1), T), *([(tokens, 2)] if decode else []))
    ]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: f"{body[0]}-{body[1]}-{body[2][0]}x{body[2][1]}")
def test_layers_of_two_kinds_share_an_array(body):
    backend, dtype, wide, narrow, size = body
    if backend == "native" and not native.available():
        pytest.skip(native.status())
    full, windowed = (KVSpec(K, h, h, window) for (K, h), window in ((narrow, None), (wide, 24)))
    specs = [windowed, full, full]
    groups = KVGroups.of(specs, 1)
    assert groups.places == ((0, 0, 0), (1, 0, 0), (1, 0, 1))

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def attend(q, k, v, kv, batch):
        return paged_attention.attend(q, k, v, kv, batch, scale=0.2)

    with paged_attention.use_backend(backend):
        shared = paged_attention.allocate(groups.arrays[0], 50, size, dtype)
        own = [paged_attention.allocate(dataclasses.replace(spec, window=None), 50, size, dtype) for spec in specs]
        assert shared.k.nbytes == own[0].k.nbytes and [kv.layout for kv in own] == [shared.layout] * 3
        todo = [
            steps_of(spec, size, 1 + 24 * group, backend == "native")
            for spec, (group, _, _) in zip(specs, groups.places, strict=True)
        ]
        for step in range(len(todo[0])):
            for layer, (spec, (_, _, part)) in enumerate(zip(specs, groups.places, strict=True)):
                batch, q, k, v = todo[layer][step]
                k, v = k + layer, v - layer
                wanted, own[layer] = attend(q, k, v, own[layer], batch)
                out, after = attend(q, k, v, layer_pages(shared, spec, part), batch)
                shared = array_pages(after)
                np.testing.assert_array_equal(out, wanted, f"step {step} of layer {layer}")
    assert np.isfinite(np.asarray(wanted)).all() and np.abs(np.asarray(wanted)).max() > 0.1
    assert jnp.dtype(dtype) != jnp.int8 or len(shared.kind_scales) == 2


def test_bytes_of_shared_pages():
    """Scales of 8-bit pages are every kind's own."""
    wide, narrow = KVSpec(8, 256, 256), KVSpec(2, 512, 512)
    (array, *_) = KVGroups.of([dataclasses.replace(wide, window=9), narrow, narrow], 1).arrays
    of = paged_attention.bytes_per_page
    assert of(array, 16, "bfloat16") == of(wide, 16, "bfloat16") == 2 * of(narrow, 16, "bfloat16")
    scales = 4 * 2 * 16 * (8 + 2 * 2)
    assert of(array, 16, "int8") == 2 * 16 * 8 * 256 + scales
    assert of(array, 16, "bfloat16", "lanes") == of(array, 16, "bfloat16")


def test_an_array_is_cut_over_a_mesh_where_all_kinds_are():
    mesh = jax.sharding.AbstractMesh((1, 2, 1), ("data", "model", "expert"))
    even, odd = KVSpec(4, 32, 32), KVSpec(1, 64, 64)

    def cut(*specs):
        kv = paged_attention.allocate(
            KVGroups.of([dataclasses.replace(even, window=9), *specs], 1).arrays[0], 4, 8, "float32"
        )
        return dataclasses.replace(kv, mesh=mesh).sharded

    assert cut(KVSpec(2, 32, 32)) and not cut(odd)
