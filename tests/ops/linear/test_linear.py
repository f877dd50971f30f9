"""`linear` and `embed` against the float64 reference, for each weight type."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.linear import Int8Weight, embed, linear, quantize, reference

SHAPES = [(1, 8, 16), (2, 33, 24), (5, 64, 100), (17, 96, 31)]  # T, O, I


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


def test_int8_weight_error_is_half_a_step():
    _, weight_OI, _ = operands(1, 40, 64)
    weight = quantize(weight_OI, "int8")
    error_OI = np.abs(np.asarray(weight.dequantize()) - np.asarray(weight_OI))
    assert (error_OI <= np.asarray(weight.scale_O)[:, None] * 0.5001).all()


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
def test_embed(scheme):
    _, table_VD, _ = operands(1, 20, 12)
    table = quantize(table_VD, scheme)
    tokens_T = jnp.array([3, 0, 19, 7])
    np.testing.assert_allclose(embed(table, tokens_T), reference.embed(table, np.asarray(tokens_T)), atol=1e-6)
    assert not np.asarray(embed(table, jnp.array([20, 10**6]))).any()
    assert embed(table, tokens_T, jnp.bfloat16).dtype == jnp.bfloat16


def test_errors_are_sentences():
    with pytest.raises(ValueError, match="takes 16"):
        linear(jnp.zeros((2, 8)), jnp.zeros((4, 16)))
    with pytest.raises(ValueError, match="known ones are int8"):
        quantize(jnp.zeros((4, 16)), "int3")
