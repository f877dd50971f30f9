"""The GPU kernels of paged attention, interpreted, against the spelled-out reference over the shared table of shapes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import paged_attention
from ops.paged_attention import mixing, pages, pallas_gpu
from ops.paged_attention.batch import KVSpec
from ops.paged_attention.cases import TEST_CASES, Case, make_arguments
from tests.ops.paged_attention import against_reference

fill = functools.partial(against_reference.fill, layout="rows")
run = functools.partial(against_reference.run, "pallas_gpu")


@pytest.mark.parametrize("name", TEST_CASES)
def test_float32_matches_reference(name):
    case = TEST_CASES[name]
    arguments = make_arguments(case)  # leftovers are NaN: whoever lets one in is found out
    out, kv = run(arguments, fill(case, arguments, np.float32))
    against_reference.assert_is_reference(arguments, out, kv)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("name", ["everything", "latent", "head_80"])
def test_narrow_pages(name, dtype):
    case = TEST_CASES[name]
    # NaN has no int8; its leftovers are loud numbers
    arguments = make_arguments(case, leftovers=1e4 if dtype == "int8" else np.nan)
    out, kv = run(arguments, fill(case, arguments, dtype), "bfloat16")
    # bfloat16 products round queries and weights to 8 bits: a mean of values of size 1 is then off by 2^-7 at most,
    # plus 2^-8 for the result itself.
    np.testing.assert_allclose(out, against_reference.expected(arguments, kv), atol=3e-2)
    against_reference.assert_new_keys_are_stored(arguments, kv, dtype, "bfloat16")


def test_int8_is_written_as_plain_xla_writes_it():
    case = TEST_CASES["mixed"]
    arguments = make_arguments(case, leftovers=1.0)
    arguments.k_TKh[0] = 0.0  # a row whose scale is zero
    _, got = run(arguments, fill(case, arguments, "int8"))
    want = jax.jit(pages.write)(
        fill(case, arguments, "int8"),
        mixing.mix(arguments.k_TKh),
        mixing.mix(arguments.v_TKh),
        arguments.batch.kv_index_T,
    )
    for name in ("k", "v", "k_scale", "v_scale"):
        one, other = (np.asarray(getattr(x, name), np.float32)[1:] for x in (got, want))
        # x / scale is rounded once here and once there: a tie may fall to either side.
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1 if name in "kv" else 0)
        assert (one != other).mean() < 1e-3


@pytest.mark.parametrize("lengths", [(5000,), (1, 700, 64, 0, 2900), (300,) * 40])
@pytest.mark.parametrize("window", [None, 100])
def test_every_key_of_a_decode_row_is_in_exactly_one_part(lengths, window):
    case = Case(decode=lengths, window=window, num_kv_heads=1, group=2)
    batch = jax.tree.map(jnp.asarray, make_arguments(case).batch)
    tuning = pallas_gpu.decode_tuning(2, 64)
    items, first_B, count_B = pallas_gpu.decode_items(batch, tuning, 40, 2, 16, window)
    first_B, count_B = np.asarray(first_B), np.asarray(count_B)
    used = []
    for row, length in enumerate(lengths):
        parts = range(first_B[row], first_B[row] + count_B[row])
        used += parts
        assert all(items.table_W[w] == row and items.rows_W[w] == 2 for w in parts)
        keys = [key for w in parts for key in range(int(items.first_W[w]), int(items.past_W[w]))]
        assert keys == list(range(max(0, length - window) if window else 0, length))
    assert used == list(range(len(used))) and len(used) <= len(items.rows_W)
    assert not np.asarray(items.rows_W)[len(used) :].any()


def test_kernels_decline_what_they_cannot_address():
    spec = KVSpec(num_kv_heads=8, head_dim=128, v_head_dim=128)

    def kv(gib, dtype):
        num_pages = gib * 2**30 // (8 * 16 * 128 * np.dtype(dtype).itemsize)
        return jax.eval_shape(lambda: pages.allocate(spec, num_pages, 16, dtype, None, "rows"))

    assert pallas_gpu.supports(kv(2, np.int8)) and not pallas_gpu.supports(kv(3, np.int8))
    assert pallas_gpu.supports(kv(5, np.int8)) and pallas_gpu.supports(kv(3, jnp.bfloat16))
    lanes = jax.eval_shape(lambda: pages.allocate(spec, 4, 16, jnp.bfloat16, None, "lanes"))
    assert not pallas_gpu.supports(lanes)


def test_interpreted_kernels_are_nobodys_choice():
    case = TEST_CASES["tiny"]
    arguments = make_arguments(case)
    kv = dataclasses.replace(fill(case, arguments, np.float32), platform="cpu")

    def text():
        step = jax.jit(functools.partial(paged_attention.attend, scale=1.0))
        return str(
            step.trace(
                *map(jnp.asarray, (arguments.q_TKGh, arguments.k_TKh, arguments.v_TKh)), kv, arguments.batch
            ).jaxpr
        )

    assert "pallas_call" not in text()
    with paged_attention.use_backend("pallas_gpu"):
        assert "pallas_call" in text()
