"""Packing on the host against packing in XLA."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ops import native
from ops.linear import host_pack, quantize
from ops.linear.weights.int8 import pack_int8

pytestmark = pytest.mark.skipif(not native.available(), reason="no native kernels")


@pytest.fixture(autouse=True)
def best_isa():
    yield
    native.set_isa(None)


@pytest.mark.parametrize("shape", [(48, 64), (50, 70), (16, 2048), (33, 129), (1, 4), (17, 3)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_as_in_xla(shape, dtype, isa):
    native.set_isa(isa)
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal(shape) * 0.1).astype(dtype)
    weight[-1] = 0
    packed = host_pack.pack(weight)
    wanted = pack_int8(quantize(jnp.asarray(weight), "int8"))
    assert packed.shape == wanted.shape and packed.rotated == wanted.rotated == (shape[1] % 64 == 0)
    np.testing.assert_allclose(packed.scale_O, wanted.scale_O, rtol=1e-6)
    # XLA multiplies by 1 / 127: the last bit of a scale may differ, and a value that lies halfway then falls the other way.
    values, theirs = np.asarray(packed.panels_PQci, int), np.asarray(wanted.panels_PQci, int)
    assert np.abs(values - theirs).max() <= 1
    assert (values != theirs).mean() < 0.01
    P, Q = values.shape[:2]
    rows = values.transpose(0, 2, 1, 3).reshape(P, 16, Q * 4)
    rows = np.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % 64)))
    np.testing.assert_array_equal(packed.sums_PGc, rows.reshape(P, 16, -1, 64).sum(-1).transpose(0, 2, 1))


def test_where_the_result_goes_and_what_is_refused():
    shapes = []

    def empty(shape, dtype):
        shapes.append((shape, np.dtype(dtype)))
        return np.empty(shape, dtype)

    host_pack.pack(np.ones((20, 8), np.float32), empty)
    assert shapes == [((2, 2, 16, 4), np.int8), ((32,), np.float32), ((2, 1, 16), np.int16)]
    for wrong in (np.ones((4, 4)), np.ones((4, 8), np.float32)[:, ::2], np.ones(4, np.float32)):
        with pytest.raises(ValueError, match="cannot pack"):
            host_pack.pack(wrong)
