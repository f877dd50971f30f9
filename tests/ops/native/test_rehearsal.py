"""What a start makes of the native kernels: programs run once without their products, and zeros that take no memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import native
from ops.linear import gated_mlp, linear, pack, quantize

pytestmark = pytest.mark.skipif(not native.available(), reason=native.status())


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_products_give_zeros_in_a_rehearsal_and_nowhere_else(scheme):
    random = np.random.default_rng(0)

    def weight(rows: int, inputs: int):
        return pack(quantize(jnp.asarray(random.normal(size=(rows, inputs)), jnp.float32), scheme))

    up, down = weight(192, 64), weight(64, 96)
    x = jnp.asarray(random.normal(size=(200, 64)), jnp.float32)
    product = jax.jit(lambda x: (linear(x, up), gated_mlp(x, up, down, "silu", residual_TD=x)))
    before = jax.tree.map(np.asarray, product(x))
    with native.rehearsal():
        assert all(not np.asarray(part).any() for part in product(x))
        with native.rehearsal(False):
            counted = product(x)
        assert not np.asarray(product(x)[0]).any()
    for found in (counted, product(x)):
        for part, wanted in zip(found, before, strict=True):
            np.testing.assert_array_equal(part, wanted)
    assert before[0].any() and before[1].any()


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("size", [5, 1 << 20, 200 << 20])
def test_zeros(size):
    native.zeros((8,), np.int8).block_until_ready()
    before = resident()
    array = jax.block_until_ready(native.zeros((size,), np.int8))
    taken = resident() - before
    assert array.dtype == np.int8 and array.shape == (size,)
    assert taken < 100 << 20, "what nobody has written to takes no memory"
    assert not np.asarray(array).any()
    written = jax.block_until_ready(jax.jit(lambda a: a.at[size // 2].set(3), donate_argnums=0)(array))
    assert int(np.asarray(written).astype(np.int64).sum()) == 3
