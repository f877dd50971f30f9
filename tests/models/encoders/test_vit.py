"""Attention among patches by the CPU's kernels, beside products that are rounded to int8, against the same written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.encoders.vit import PatchAttention, VitConfig
from models.layers import Build
from models.parameters import parameters_of
from ops.linear import pack, quantize
from ops.paged_attention import whole

pytestmark = pytest.mark.skipif(not whole.supports(2, 32, "cpu"), reason="this machine has no native kernels")


@pytest.mark.parametrize(
    ("tile", "patches", "real", "theta"),
    [(0, 70, 70, None), (0, 70, 41, 1e4), (20, 60, 60, None), (20, 60, 60, 1e2), (20, 20, 20, None)],
)
def test_patches_attend_as_written_out(tile, patches, real, theta, monkeypatch):
    config = VitConfig(1, 64, 64, 2, 12, 64, 120, tile=tile, rope_theta=theta)
    attention, random = PatchAttention(config, 0, Build()), np.random.default_rng(0)
    for _, parameter in parameters_of(attention):
        shape = parameter.get_value().shape
        value = jnp.asarray(random.standard_normal(shape).astype(np.float32) * (0.2 if len(shape) > 1 else 0.1))
        parameter.set_value(pack(quantize(value, "int8")) if len(shape) > 1 else value)
    x = jnp.asarray(random.standard_normal((patches, 64)).astype(np.float32))
    place = jnp.asarray(random.integers(0, 9, (patches, 2)), jnp.int32)
    real_P = jnp.arange(patches) < real
    assert attention._by_kernel()
    found = jax.jit(lambda x: attention(x, place, real_P))(x)
    monkeypatch.setattr(PatchAttention, "_by_kernel", lambda self: False)
    wanted = jax.jit(lambda x: attention(x, place, real_P))(x)
    np.testing.assert_allclose(found[:real], wanted[:real], atol=3e-2 * float(np.abs(wanted).max()))
