import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ops import native
from ops.norm import layer_norm, rms_norm

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 96)])
def test_rms_norm_matches_torch(shape):
    x, scale = RNG.standard_normal(shape).astype(np.float32), RNG.standard_normal(shape[-1]).astype(np.float32)
    want = torch.nn.functional.rms_norm(torch.tensor(x), shape[-1:], torch.tensor(scale), eps=1e-5)
    np.testing.assert_allclose(rms_norm(x, scale, 1e-5), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rms_norm(x, scale - 1, 1e-5, unit_offset=True), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(rms_norm(x, None, 1e-5) * scale, want, rtol=1e-5, atol=1e-6)


def test_rms_norm_of_large_half_precision_does_not_overflow():
    x = jnp.full((1, 64), 300.0, jnp.float16)  # 300^2 is beyond float16
    out = rms_norm(x, None, 1e-6)
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(out, 1.0, rtol=1e-3)


def test_layer_norm_matches_torch():
    x = RNG.standard_normal((5, 64)).astype(np.float32) + 3
    scale, bias = RNG.standard_normal((2, 64)).astype(np.float32)
    want = torch.nn.functional.layer_norm(torch.tensor(x), (64,), torch.tensor(scale), torch.tensor(bias), eps=1e-5)
    np.testing.assert_allclose(layer_norm(x, scale, bias, 1e-5), want, rtol=1e-5, atol=1e-5)
    want = torch.nn.functional.layer_norm(torch.tensor(x), (64,), eps=1e-5)
    np.testing.assert_allclose(layer_norm(x, None, None, 1e-5), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_a_row_is_the_same_among_any_number_of_others(isa):
    """To the last bit, on a CPU with native kernels; and they have gradients."""
    if not native.available() or jax.device_count() > 1:
        pytest.skip(native.status())
    if native.set_isa(isa) != isa:
        native.set_isa(None)
        pytest.skip(f"this CPU has no {isa}")
    try:
        for width in (64, 100):
            x = RNG.standard_normal((70, 3, width)).astype(np.float32)
            scale, bias = RNG.standard_normal((2, width)).astype(np.float32)
            for norm in (lambda x: rms_norm(x, scale, 1e-5), lambda x: layer_norm(x, scale, bias, 1e-5)):  # noqa: B023
                whole = norm(x)
                for rows in (1, 3, 8):
                    np.testing.assert_array_equal(jax.jit(norm)(x[:rows]), whole[:rows])
        slope = jax.grad(lambda x: rms_norm(x, scale, 1e-5).sum())(x[0])
        y = torch.tensor(x[0], requires_grad=True)
        torch.nn.functional.rms_norm(y, (width,), torch.tensor(scale), eps=1e-5).sum().backward()
        np.testing.assert_allclose(slope, y.grad, atol=1e-5)
    finally:
        native.set_isa(None)
