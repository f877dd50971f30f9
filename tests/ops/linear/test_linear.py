"""`linear` and `embed` against the float64 reference, for each weight type."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.linear import Int8Weight, embed, linear, quantize, reference
from ops.linear.weights.int8 import quantize_rows
from ops.linear.weights.rotation import rotate

SHAPES = [(1, 8, 16), (2, 33, 24), (5, 64, 100), (17, 96, 31), (3, 20, 192)]  # T, O, I


def operands(T, O, I, dtype=jnp.float32):
    rng = np.random.default_rng(T * 1000 + O)
    x_TI = jnp.asarray(rng.normal(size=(T, I)), jnp.float32)
    weight_OI = jnp.asarray(rng.normal(size=(O, I)) / np.sqrt(I), dtype)
    return x_TI, weight_OI, jnp.asarray(rng.normal(size=O), jnp.float32)


@pytest.mark.parametrize(("T", "O", "I"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_dense_float32(T, O, I, with_bias):
    x_TI, weight_OI, bias_O = operands(T, O, I)
    bias = bias_O if with_bias else None
    y_TO = jax.jit(linear)(x_TI, weight_OI, bias)
    assert y_TO.dtype == jnp.float32
    np.testing.assert_allclose(y_TO, reference.linear(x_TI, weight_OI, bias), atol=2e-5)


@pytest.mark.parametrize(("T", "O", "I"), SHAPES)
def test_dense_bfloat16_accumulates_in_float32(T, O, I):
    x_TI, weight_OI, _ = operands(T, O, I, jnp.bfloat16)
    y_TO = jax.jit(linear)(x_TI, weight_OI)
    assert y_TO.dtype == jnp.float32
    expected_TO = reference.linear(np.asarray(x_TI.astype(jnp.bfloat16), np.float32), weight_OI)
    np.testing.assert_allclose(y_TO, expected_TO, atol=2e-5)


def test_out_dtype_and_leading_axes():
    x_TI, weight_OI, _ = operands(6, 8, 16)
    y = linear(x_TI.reshape(2, 3, 16), weight_OI, out_dtype=jnp.bfloat16)
    assert y.shape == (2, 3, 8) and y.dtype == jnp.bfloat16
    assert linear(x_TI.astype(jnp.bfloat16), weight_OI).dtype == jnp.bfloat16


@pytest.mark.parametrize(("T", "O", "I"), SHAPES)
def test_int8_equals_rounded_reference(T, O, I):
    x_TI, weight_OI, bias_O = operands(T, O, I)
    weight = quantize(weight_OI, "int8")
    assert isinstance(weight, Int8Weight) and weight.shape == (O, I)
    y_TO = jax.jit(linear)(x_TI, weight, bias_O)
    # One step of one activation may round the other way: its product is at most scale_x * 127 * scale_w.
    step = float(jnp.abs(x_TI).max()) / 127 * float(jnp.abs(weight_OI).max())
    np.testing.assert_allclose(y_TO, reference.int8_linear(x_TI, weight, bias_O), atol=step)


@pytest.mark.parametrize("I", [64, 50])  # rotated and not
def test_int8_weight_error_is_half_a_step(I):
    _, weight_OI, _ = operands(1, 40, I)
    weight = quantize(weight_OI, "int8")
    assert weight.rotated == (I == 64)
    wanted_OI = np.asarray(weight_OI, np.float64)
    wanted_OI = reference.rotate(wanted_OI) if weight.rotated else wanted_OI
    error_OI = np.abs(np.asarray(weight.values_OI) * np.asarray(weight.scale_O)[:, None] - wanted_OI)
    assert (error_OI <= np.asarray(weight.scale_O)[:, None] * 0.5001).all()
    np.testing.assert_allclose(weight.dequantize(), reference.dense(weight), atol=1e-6)


def test_rotation_is_its_own_inverse_and_keeps_products():
    x_TI, weight_OI, _ = operands(3, 8, 192)
    np.testing.assert_allclose(rotate(rotate(x_TI)), x_TI, atol=1e-5)
    np.testing.assert_allclose(rotate(x_TI), reference.rotate(np.asarray(x_TI, np.float64)), atol=1e-5)
    np.testing.assert_allclose(rotate(x_TI) @ rotate(weight_OI).T, x_TI @ weight_OI.T, atol=1e-4)


def test_an_outlier_does_not_cost_the_others_their_precision():
    """One scale a row: without rotation the step would be 1000 / 127, larger than all other inputs."""
    x_TI, weight_OI, _ = operands(4, 32, 256)
    x_TI = x_TI.at[:, 3].set(1000.0)
    weight = quantize(weight_OI, "int8")
    plain = Int8Weight(*quantize_rows(weight_OI))
    exact_TO = reference.linear(x_TI, weight_OI)
    error, without = (np.abs(linear(x_TI, w) - exact_TO).mean() for w in (weight, plain))
    assert error < 0.5 * without


def test_rotation_needs_whole_blocks_on_every_device():
    code = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ops.linear import linear, quantize
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("model",)), PartitionSpec(None, "model"))
for inputs, rotated in ((128, True), (192, False)):  # 64 or 96 a device
    whole = jnp.asarray(np.random.default_rng(0).normal(size=(8, inputs)), jnp.float32)
    weight = quantize(jax.device_put(whole, sharding), "int8")
    assert weight.rotated == rotated and quantize(whole, "int8").rotated
    np.testing.assert_allclose(jax.jit(linear)(whole, weight), whole @ whole.T, atol=0.02 * inputs)
"""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_int8_rows_of_zeros_stay_zero():
    weight = quantize(jnp.zeros((4, 8)), "int8")
    assert not np.asarray(linear(jnp.zeros((3, 8)), weight)).any()


def test_one_loud_row_does_not_hurt_the_others():
    x_TI, weight_OI, _ = operands(4, 32, 64)
    weight = quantize(weight_OI, "int8")
    quiet_TO = linear(x_TI, weight)
    loud_TO = linear(x_TI.at[0].mul(1e4), weight)
    np.testing.assert_array_equal(quiet_TO[1:], loud_TO[1:])


@pytest.mark.parametrize("scheme", [None, "int8"])
@pytest.mark.parametrize("D", [12, 128])
def test_embed(scheme, D):
    _, table_VD, _ = operands(1, 20, D)
    table = quantize(table_VD, scheme)
    tokens_T = jnp.array([3, 0, 19, 7])
    np.testing.assert_allclose(embed(table, tokens_T), reference.embed(table, np.asarray(tokens_T)), atol=1e-6)
    assert not np.asarray(embed(table, jnp.array([20, 10**6]))).any()
    assert embed(table, tokens_T, jnp.bfloat16).dtype == jnp.bfloat16


def test_errors_are_sentences():
    with pytest.raises(ValueError, match="takes 16"):
        linear(jnp.zeros((2, 8)), jnp.zeros((4, 16)))
    with pytest.raises(ValueError, match="known ones are int8, int4"):
        quantize(jnp.zeros((4, 16)), "int3")
