"""Every body of paged attention against the spelled-out reference, over one table of shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import paged_attention
from ops.paged_attention import pages, reference
from ops.paged_attention.batch import KVSpec
from ops.paged_attention.cases import TEST_CASES, Arguments, Case, make_arguments

# (backend, layout of the pages)
BODIES = [("xla", "rows"), ("xla", "panels")]


def fill(case: Case, arguments: Arguments, dtype, layout) -> paged_attention.KVPages:
    """Pages in a layout holding the case's history, leftovers of other requests included."""
    num_pages, size, K, _ = arguments.history_k.shape
    kv = pages.allocate(case.spec, num_pages, size, dtype, None, layout)
    k = arguments.history_k.reshape(num_pages * size, K, -1)
    v = None if arguments.history_v is None else arguments.history_v.reshape(num_pages * size, K, -1)
    return jax.jit(pages.write)(kv, k, v, jnp.arange(num_pages * size, dtype=jnp.int32))


def run(backend: str, arguments: Arguments, kv, dtype=np.float32):
    """attend's output (float32 numpy) and pages."""
    options = dict(arguments.options)
    sinks_KG = options.pop("sinks_KG")
    q, k, v = (
        None if x is None else jnp.asarray(x, dtype) for x in (arguments.q_TKGh, arguments.k_TKh, arguments.v_TKh)
    )
    with paged_attention.use_backend(backend):
        step = jax.jit(functools.partial(paged_attention.attend, **options), donate_argnums=3)
        out, kv = step(q, k, v, kv, arguments.batch, sinks_KG=sinks_KG)
    assert out.dtype == q.dtype
    return np.asarray(out, np.float32), kv


def plain(kv) -> tuple[np.ndarray, np.ndarray | None]:
    """Pages as [page, slot, K, h] float32."""
    k, v = pages.read(kv, jnp.arange(kv.num_pages), jnp.float32)
    k, v = np.asarray(k).swapaxes(1, 2), np.asarray(v).swapaxes(1, 2)
    return k, None if kv.v is None else v


def expected(arguments: Arguments, kv):
    """The reference's output on what the pages hold after the step (so that rounding into pages is not counted)."""
    k_NsKh, v_NsKh = plain(kv)
    page, slot = np.divmod(arguments.batch.kv_index_T, kv.page_size)
    new_v = None if v_NsKh is None else v_NsKh[page, slot]
    return reference.attend(
        arguments.q_TKGh, k_NsKh[page, slot], new_v, k_NsKh, v_NsKh, arguments.batch, **arguments.options
    )[0]


@pytest.mark.parametrize("backend,layout", BODIES, ids="-".join)
@pytest.mark.parametrize("name", TEST_CASES)
def test_float32_matches_reference(name, backend, layout):
    case = TEST_CASES[name]
    arguments = make_arguments(case)  # leftovers are NaN: whoever lets one in is found out
    out, kv = run(backend, arguments, fill(case, arguments, np.float32, layout))
    want, want_k, want_v = reference.attend(
        arguments.q_TKGh, arguments.k_TKh, arguments.v_TKh, arguments.history_k, arguments.history_v,
        arguments.batch, **arguments.options,
    )  # fmt: skip
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)
    k_NsKh, v_NsKh = plain(kv)
    np.testing.assert_array_equal(k_NsKh[1:], want_k[1:].astype(np.float32))
    if want_v is not None:
        np.testing.assert_array_equal(v_NsKh[1:], want_v[1:].astype(np.float32))


NARROW_CASES = ["decode", "chunk_rows", "everything", "head_24", "value_head_smaller", "latent", "page_32"]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("backend,layout", BODIES, ids="-".join)
@pytest.mark.parametrize("name", NARROW_CASES)
def test_narrow_pages(name, backend, layout, dtype):
    if layout == "panels" and dtype.startswith("float8"):
        pytest.skip("the panels layout is not used for float8")
    case = TEST_CASES[name]
    arguments = make_arguments(case)
    out, kv = run(backend, arguments, fill(case, arguments, dtype, layout))
    # bfloat16 products round weights (and queries) to 8 bits; a mean of values of size 1 is then off by 2^-8 at most.
    np.testing.assert_allclose(out, expected(arguments, kv), atol=1.6e-2 if dtype == "bfloat16" else 2e-5)
    k_NsKh, _ = plain(kv)
    page, slot = np.divmod(arguments.batch.kv_index_T, case.page_size)
    real = page > 0
    step = {"bfloat16": 2.0**-8, "int8": 1 / 127, "float8_e4m3fn": 2.0**-4}[dtype]
    largest = np.abs(arguments.k_TKh[real]).max(-1, keepdims=True)
    assert (np.abs(k_NsKh[page, slot][real] - arguments.k_TKh[real]) <= largest * step).all()


@pytest.mark.parametrize("backend,layout", BODIES, ids="-".join)
def test_bfloat16_activations(backend, layout):
    case = TEST_CASES["mixed"]
    arguments = make_arguments(case)
    out, kv = run(backend, arguments, fill(case, arguments, "bfloat16", layout), jnp.bfloat16)
    np.testing.assert_allclose(out, expected(arguments, kv), atol=3e-2)


@pytest.mark.parametrize("backend,layout", BODIES, ids="-".join)
def test_padded_tokens_yield_zeros(backend, layout):
    case = TEST_CASES["mixed"]
    arguments = make_arguments(case)
    out, _ = run(backend, arguments, fill(case, arguments, np.float32, layout))
    padding = arguments.batch.kv_index_T == 0
    assert padding.any() and (out[padding] == 0).all() and (out[~padding] != 0).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("backend,layout", BODIES, ids="-".join)
def test_pages_are_updated_in_place(backend, layout):
    case = Case(decode=(30, 31), chunks=((5, 20),))
    arguments = make_arguments(case)
    kv = pages.allocate(case.spec, 1000, case.page_size, np.float32, None, layout)
    options = {name: value for name, value in arguments.options.items() if name != "sinks_KG"}
    with paged_attention.use_backend(backend):
        step = jax.jit(functools.partial(paged_attention.attend, **options), donate_argnums=3)
        program = step.lower(arguments.q_TKGh, arguments.k_TKh, arguments.v_TKh, kv, arguments.batch).compile()
    memory = program.memory_analysis()
    pages_bytes = kv.k.nbytes + kv.v.nbytes
    assert memory.alias_size_in_bytes >= pages_bytes
    assert memory.temp_size_in_bytes < pages_bytes // 4, "the program keeps a second copy of the pages"


def test_bytes_per_page():
    spec = KVSpec(num_kv_heads=3, head_dim=64, v_head_dim=32)
    assert paged_attention.bytes_per_page(spec, 16, np.float32) == 16 * 3 * 96 * 4
    assert paged_attention.bytes_per_page(spec, 16, jnp.bfloat16) == 16 * 3 * 96 * 2
    assert paged_attention.bytes_per_page(spec, 16, np.int8) == 16 * 3 * (96 + 8)
    for dtype in (np.float32, jnp.bfloat16, np.int8):
        kv = paged_attention.allocate(spec, 10, 16, dtype)
        stored = sum(leaf.nbytes for leaf in jax.tree.leaves(kv))
        assert stored == 10 * paged_attention.bytes_per_page(spec, 16, dtype)


def test_wrong_arguments_are_explained():
    spec = KVSpec(num_kv_heads=3, head_dim=64, v_head_dim=64)
    with pytest.raises(ValueError, match="int32"):
        paged_attention.allocate(spec, 10, 16, np.int32)
    with pytest.raises(ValueError, match="at least 2 pages"):
        paged_attention.allocate(spec, 1, 16, np.float32)
    with pytest.raises(ValueError, match="Unknown attention backend 'fast'"), paged_attention.use_backend("fast"):
        pass
