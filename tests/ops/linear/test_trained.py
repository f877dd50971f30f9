"""Weights in training: values and gradients are those of the dense weight that they stand for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import native
from ops.linear import gated_mlp, linear, pack, quantize
from ops.linear.weights.base import StoredWeight
from ops.linear.weights.trained import Change, TrainedWeight, _grouped

O, I, R, T = 96, 128, 4, 24


def close(found, expected, within):
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.abs(found - expected).max() <= within * np.abs(expected).max()


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_a_frozen_weight_passes_gradients_and_its_change_gets_them(scheme):
    if scheme == "int4" and not native.available():
        pytest.skip("no native kernels")
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((T, I)), jnp.float32)
    base = pack(quantize(jnp.asarray(rng.standard_normal((O, I)), jnp.float32), scheme))
    dense = base.dequantize() if isinstance(base, StoredWeight) else base
    a, b = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((R, I), (O, R)))
    y = jnp.asarray(rng.standard_normal((T, O)), jnp.float32)

    def ours(x, a, b):
        return (linear(x, TrainedWeight(base, Change(a, b.T))) * y).sum()

    def theirs(x, a, b):
        return ((x @ dense.T + (x @ a.T) @ b.T) * y).sum()

    found, expected = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(x, a, b) for f in (ours, theirs))
    close(found[0], expected[0], 1e-6 if scheme is None else 0.03)  # activations are rounded forward
    for mine, other in zip(found[1], expected[1], strict=True):
        close(mine, other, 2e-6)
    close(TrainedWeight(base, Change(a, b.T)).dequantize(), dense + b @ a, 1e-6)


def test_half_precision_rounds_factors_and_adds_up_in_float32():
    rng = np.random.default_rng(4)
    x, y = (jnp.asarray(rng.standard_normal((T, width)), jnp.float32) for width in (I, O))
    weight = jnp.asarray(rng.standard_normal((O, I)), jnp.bfloat16)
    x_, y_ = (z.astype(jnp.bfloat16).astype(jnp.float32) for z in (x, y))

    def ours(x, weight):
        return (linear(x, TrainedWeight(weight)) * y).sum()

    value, (dx, dw) = jax.value_and_grad(ours, (0, 1))(x, weight)
    close(value, ((x_ @ weight.astype(jnp.float32).T) * y).sum(), 1e-5)
    close(dx, y_ @ weight.astype(jnp.float32), 1e-5)
    close(dw.astype(jnp.float32), y_.T @ x_, 5e-3)
    assert dx.dtype == jnp.float32 and dw.dtype == jnp.bfloat16


def test_pairs_beside_half_precision_are_rounded_alike_and_get_float32_gradients():
    rng = np.random.default_rng(5)
    x, y = (jnp.asarray(rng.standard_normal((T, width)), jnp.float32) for width in (I, O))
    weight = jnp.asarray(rng.standard_normal((O, I)) * 0.1, jnp.bfloat16)
    a, b = (jnp.asarray(rng.standard_normal(shape) * 0.1, jnp.float32) for shape in ((R, I), (O, R)))

    def ours(x, a, b):
        out = linear(x, TrainedWeight(weight, Change(a, b.T)))
        return (out * y).sum(), out

    def theirs(x, a, b):
        out = x @ weight.astype(jnp.float32).T + (x @ a.T) @ b.T
        return (out * y).sum(), out

    (found, out), (expected, wanted) = (jax.grad(f, (0, 1, 2), has_aux=True)(x, a, b) for f in (ours, theirs))
    for mine, other in zip((*found, out), (*expected, wanted), strict=True):
        assert mine.dtype == jnp.float32
        assert np.linalg.norm(mine - other) < 0.006 * np.linalg.norm(other), "roundings, of factors alone"


def test_quantized_blocks_are_taken_apart():
    """A fused native block has no gradient: both of its products are computed by themselves."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((T, I)), jnp.float32)
    up, down = (
        pack(quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32) * 0.1, "int8"))
        for shape in ((2 * O, I), (I, O))
    )

    def ours(x):
        return gated_mlp(x, TrainedWeight(up), TrainedWeight(down), "silu").sum()

    def theirs(x):
        gate, value = jnp.split(x @ up.dequantize().T, 2, axis=-1)
        return ((jax.nn.silu(gate) * value) @ down.dequantize().T).sum()

    close(jax.grad(ours)(x), jax.grad(theirs)(x), 0.05)


def test_dropout_is_of_what_a_sees_and_keeps_the_mean():
    x, a, b = jnp.ones((400, I)), jnp.ones((1, I)) / I, jnp.ones((1, 1))
    found = Change(a, b, jax.random.key(0), 0.25)(x)
    assert 0.9 < float(found.mean()) < 1.1 and float(found.std()) > 0.01
    np.testing.assert_allclose(Change(a, b)(x), np.ones((400, 1)), rtol=1e-5)


@pytest.mark.parametrize("kernels", [True, False])
def test_experts(kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(native, "available", lambda: False)
    rng = np.random.default_rng(2)
    E, sizes = 3, np.array([5, 0, 9], np.int32)
    x = jnp.asarray(rng.standard_normal((16, I)), jnp.float32)  # two rows are nobody's
    weight = jnp.asarray(rng.standard_normal((E, O, I)), jnp.float32)
    y = jnp.asarray(rng.standard_normal((16, O)), jnp.float32)
    expert = np.repeat(np.arange(E), sizes)

    def ours(x, weight):
        return (_grouped(x, weight, sizes) * y).sum()

    def theirs(x, weight):
        return (jnp.einsum("mi,moi->mo", x[:14], weight[expert]) * y[:14]).sum()

    found, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(x, weight) for f in (ours, theirs))
    close(found[0], expected[0], 1e-5)
    for mine, other in zip(found[1], expected[1], strict=True):
        close(mine, other, 1e-5)
