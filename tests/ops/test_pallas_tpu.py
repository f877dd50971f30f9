"""The TPU kernels of paged attention, simulated, against the spelled-out reference over the shared table of shapes.

The simulator runs copies when they are waited for and fills fresh memory with NaN, so that a missing wait or a read of
something never written shows in the result.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from ops import paged_attention
from ops.paged_attention import pages, pallas_tpu, reference
from ops.paged_attention.batch import KVSpec
from ops.paged_attention.cases import TEST_CASES, make_arguments

SIMULATOR = pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan")


def fill(case, arguments, dtype):
    """Pages in lanes holding the case's history, leftovers of other requests included, as if on a TPU."""
    num_pages, size, K, _ = arguments.history_k.shape
    kv = pages.allocate(case.spec, num_pages, size, dtype, None, "lanes")
    k = arguments.history_k.reshape(num_pages * size, K, -1)
    v = None if arguments.history_v is None else arguments.history_v.reshape(num_pages * size, K, -1)
    kv = jax.jit(pages.write)(kv, k, v, jnp.arange(num_pages * size, dtype=jnp.int32))
    return dataclasses.replace(kv, platform="tpu")


def run(arguments, kv, dtype=np.float32):
    """attend's output (float32 numpy) and pages."""
    options = dict(arguments.options)
    sinks_KG = options.pop("sinks_KG")
    q, k, v = (
        None if x is None else jnp.asarray(x, dtype) for x in (arguments.q_TKGh, arguments.k_TKh, arguments.v_TKh)
    )
    with paged_attention.use_backend("pallas_tpu"), pltpu.force_tpu_interpret_mode(SIMULATOR):
        step = jax.jit(functools.partial(paged_attention.attend, **options))
        out, kv = jax.block_until_ready(step(q, k, v, kv, arguments.batch, sinks_KG=sinks_KG))
    assert out.dtype == q.dtype
    return np.asarray(out, np.float32), kv


def plain(kv):
    """Pages as [page, slot, K, h] float32."""
    k, v = pages.read(kv, jnp.arange(kv.num_pages), jnp.float32)
    return np.asarray(k).swapaxes(1, 2), np.asarray(v).swapaxes(1, 2) if kv.spec.v_head_dim else None


SOME = ("chunk_rows", "everything", "latent", "page_32")
"""Between them every branch of the kernels; the whole table takes minutes."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SOME else pytest.mark.slow)
        for name, case in TEST_CASES.items()
        if pallas_tpu.supports(case.page_size, np.float32)
    ],
)
def test_float32_matches_reference(name):
    case = TEST_CASES[name]
    arguments = make_arguments(case)  # leftovers are NaN: whoever lets one in is found out
    out, kv = run(arguments, fill(case, arguments, np.float32))
    want, want_k, want_v = reference.attend(
        arguments.q_TKGh, arguments.k_TKh, arguments.v_TKh, arguments.history_k, arguments.history_v,
        arguments.batch, **arguments.options,
    )  # fmt: skip
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)
    k_NsKh, v_NsKh = plain(kv)
    np.testing.assert_array_equal(k_NsKh[1:], want_k[1:].astype(np.float32))
    if want_v is not None:
        np.testing.assert_array_equal(v_NsKh[1:], want_v[1:].astype(np.float32))


@pytest.mark.parametrize(
    "dtype,page_size,head_dim,activations",
    [
        ("bfloat16", 16, 64, "bfloat16"),
        ("float8_e4m3fn", 32, 64, "bfloat16"),
        ("int8", 128, 128, "bfloat16"),
    ],
)
def test_narrow_pages(dtype, page_size, head_dim, activations):
    case = dataclasses.replace(TEST_CASES["everything"], page_size=page_size, head_dim=head_dim)
    arguments = make_arguments(case)
    if dtype == "int8":  # NaN has no int8; its leftovers are loud numbers
        arguments = make_arguments(case, leftovers=1e4)
    out, kv = run(arguments, fill(case, arguments, dtype), activations)
    k_NsKh, v_NsKh = plain(kv)
    page, slot = np.divmod(arguments.batch.kv_index_T, case.page_size)
    want, _, _ = reference.attend(
        arguments.q_TKGh, k_NsKh[page, slot], v_NsKh[page, slot], k_NsKh, v_NsKh, arguments.batch, **arguments.options
    )
    # bfloat16 products round queries and weights to 8 bits: a mean of values of size 1 is then off by 2^-7 at most,
    # plus 2^-8 for the result itself.
    np.testing.assert_allclose(out, want, atol=3e-2 if activations == "bfloat16" else 2e-5)
    real = page > 0
    step = {"bfloat16": 2.0**-8, "int8": 1 / 127, "float8_e4m3fn": 2.0**-4}[dtype]
    new_k = np.asarray(jnp.asarray(arguments.k_TKh, activations), np.float32)[real]
    largest = np.abs(new_k).max(-1, keepdims=True)
    assert (np.abs(k_NsKh[page, slot][real] - new_k) <= largest * step).all()


def test_kernels_decline_what_they_cannot_read():
    spec = KVSpec(num_kv_heads=2, head_dim=64, v_head_dim=64)
    assert pallas_tpu.supports(16, "bfloat16") and not pallas_tpu.supports(8, "bfloat16")
    assert pallas_tpu.supports(128, "int8") and not pallas_tpu.supports(64, "int8")
    case = dataclasses.replace(TEST_CASES["mixed"], page_size=8)
    arguments = make_arguments(case)
    kv = pages.allocate(spec, arguments.history_k.shape[0], 8, "bfloat16", None, "lanes")
    kv = dataclasses.replace(kv, platform="cpu")
    with pytest.raises(NotImplementedError):
        run(arguments, kv)


@pytest.mark.parametrize("head_dim,v_head_dim", [(64, 64), (80, 48), (128, 128), (96, 0)])
def test_lanes_give_back_what_was_put_in(head_dim, v_head_dim):
    spec = KVSpec(num_kv_heads=2, head_dim=head_dim, v_head_dim=v_head_dim)
    rng = np.random.default_rng(0)
    k = rng.standard_normal((5, 2, head_dim)).astype(np.float32)
    v = rng.standard_normal((5, 2, v_head_dim)).astype(np.float32) if v_head_dim else None
    index = np.array([9, 8, 31, 16, 23], np.int32)
    kv = pages.write(pages.allocate(spec, 4, 8, np.float32, None, "lanes"), k, v, index)
    got_k, got_v = pages.read(kv, index // 8, np.float32)
    rows = np.arange(5)
    np.testing.assert_array_equal(np.asarray(got_k)[rows, :, index % 8], k)
    np.testing.assert_array_equal(np.asarray(got_v)[rows, :, index % 8], k if v is None else v)
    assert kv.k.nbytes == 4 * paged_attention.bytes_per_page(spec, 8, np.float32, "lanes")
