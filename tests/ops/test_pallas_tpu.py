"""The TPU kernels of paged attention, simulated, against the spelled-out reference over the shared table of shapes.

The simulator runs copies when they are waited for and fills fresh memory with NaN, so that a missing wait or a read of
something never written shows in the result.
"""

import dataclasses

import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from ops import paged_attention
from ops.paged_attention import pages, pallas_tpu
from ops.paged_attention.batch import KVSpec
from ops.paged_attention.cases import TEST_CASES, make_arguments
from tests.ops.paged_attention import against_reference

SIMULATOR = pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan")


def fill(case, arguments, dtype):
    """Pages as if on a TPU."""
    return dataclasses.replace(against_reference.fill(case, arguments, dtype, "lanes"), platform="tpu")


def run(arguments, kv, dtype=np.float32):
    with pltpu.force_tpu_interpret_mode(SIMULATOR):
        return against_reference.run("pallas_tpu", arguments, kv, dtype)


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
    against_reference.assert_is_reference(arguments, out, kv)


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
    # bfloat16 products round queries and weights to 8 bits: a mean of values of size 1 is then off by 2^-7 at most,
    # plus 2^-8 for the result itself.
    atol = 3e-2 if activations == "bfloat16" else 2e-5
    np.testing.assert_allclose(out, against_reference.expected(arguments, kv), atol=atol)
    against_reference.assert_new_keys_are_stored(arguments, kv, dtype, activations)


def test_what_does_not_attend_is_written():
    arguments = make_arguments(TEST_CASES["chunk_past_group"])
    batch, asked_T = arguments.batch.last(np.array([1, 0], np.int32))
    whole, want_kv = run(arguments, fill(TEST_CASES["chunk_past_group"], arguments, np.float32))
    some = dataclasses.replace(arguments, batch=batch)
    out, kv = run(some, fill(TEST_CASES["chunk_past_group"], arguments, np.float32))
    np.testing.assert_allclose(out[asked_T], whole[asked_T], atol=2e-5)
    for mine, wanted in zip(against_reference.plain(kv), against_reference.plain(want_kv), strict=True):
        np.testing.assert_array_equal(mine[1:], wanted[1:])


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
