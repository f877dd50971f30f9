"""The native int8 products against the reference, at every instruction-set level this machine has."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import native
from ops.linear import (
    CentredNorm,
    Int8Weight,
    PackedInt8Weight,
    RmsNorm,
    embed,
    gated_mlp,
    linear,
    mlp,
    quantize,
    reference,
)
from ops.linear.weights.int8 import GROUP, pack_int8, quantize_rows

pytestmark = pytest.mark.skipif(not native.available(), reason=native.status())

# T, O, I: one row and ragged rows, channels and inputs; more than one row block; the tail of the tail.
# The first and the fifth are rotated.
SHAPES = [(1, 64, 64), (2, 16, 4), (3, 37, 50), (7, 130, 67), (49, 96, 128), (101, 81, 133)]


def at_each_level(run):
    """What `run()` returns at each level that has int8 kernels of its own; programs are compiled once for all."""
    try:
        for level in ("generic", "avx2", "vnni"):
            if native.set_isa(level) == level:
                yield level, np.asarray(run())
    finally:
        native.set_isa(None)


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape) * scale, jnp.float32)


def packed(O, I, seed=1):
    return pack_int8(quantize(normal(O, I, seed=seed, scale=I**-0.5), "int8"))


def assert_close(y_TO, expected_TO, x_TI, weight):
    # An activation that lies between two steps may round either way: its step times its weight, for a few of them.
    step = float(np.abs(x_TI).max()) / 127 * float(np.abs(weight.dequantize()).max())
    np.testing.assert_allclose(y_TO, expected_TO, atol=2 * step, rtol=1e-5)
    # But almost everywhere there is no such activation.
    assert np.mean(np.abs(y_TO - expected_TO) > 1e-4) < 0.1


def test_pack_and_unpack_are_inverse():
    weight = quantize(normal(37, 50), "int8")
    again = pack_int8(weight).unpack()
    np.testing.assert_array_equal(again.values_OI, weight.values_OI)
    np.testing.assert_array_equal(again.scale_O, weight.scale_O)


@pytest.mark.parametrize(("T", "O", "I"), SHAPES)
def test_linear(T, O, I):
    x_TI, weight = normal(T, I), packed(O, I)
    expected_TO = reference.int8_linear(x_TI, weight.unpack(), group=GROUP)
    run = jax.jit(linear)
    for level, y_TO in at_each_level(lambda: run(x_TI, weight)):
        np.testing.assert_allclose(y_TO, expected_TO, atol=2e-5 * I**0.5, err_msg=level)


@pytest.mark.parametrize(("T", "O", "I"), SHAPES[2:5])
def test_linear_with_everything_around_it(T, O, I):
    x_TI, weight = normal(T, I, scale=30.0), packed(O, I)
    bias_O, residual_TO = normal(O, seed=3), normal(T, O, seed=4)
    norm = RmsNorm(normal(I, seed=5), 1e-5)
    run = jax.jit(lambda x: linear(x, weight, bias_O, norm=norm, residual_TO=residual_TO))
    normed_TI = reference.rms_norm(x_TI, norm.scale_I, norm.eps)
    expected_TO = reference.int8_linear(normed_TI, weight.unpack(), np.asarray(bias_O), GROUP) + np.asarray(residual_TO)
    for _, y_TO in at_each_level(lambda: run(x_TI)):
        assert_close(y_TO, expected_TO, normed_TI, weight)


def test_an_activation_behind_a_centred_norm_and_a_product():
    x_TI, weight, bias_O, residual_TO = normal(7, 128, scale=3.0), packed(50, 128), normal(50), normal(7, 50, seed=4)
    norm = CentredNorm(normal(128, seed=5), normal(128, seed=6), 1e-5)
    normed_TI = reference.layer_norm(x_TI + 2.0, *norm)
    expected_TO = reference.gate("gelu", reference.int8_linear(normed_TI, weight.unpack(), bias_O, GROUP)) + residual_TO
    how = {"norm": norm, "residual_TO": residual_TO, "activation": "gelu"}
    run = jax.jit(lambda x: linear(x, weight, bias_O, **how))
    for _, y_TO in at_each_level(lambda: run(x_TI + 2.0)):
        assert_close(y_TO, expected_TO, normed_TI, weight)
    dense = jax.jit(lambda x: linear(x, weight.dequantize(), bias_O, **how))(x_TI + 2.0)
    np.testing.assert_allclose(dense, expected_TO, atol=0.1)


# One group of rows and several, shared by columns; rows that each thread has of its own, the last of them fewer.
@pytest.mark.parametrize(("T", "D", "F"), [(3, 50, 48), (200, 64, 128), (1601, 64, 48)])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "relu"])
def test_mlp(T, D, F, activation):
    x_TD, up, down = normal(T, D, scale=3.0), packed(F, D), packed(D, F, seed=2)
    biases, residual_TD = (normal(F, seed=6), normal(D, seed=7)), normal(T, D, seed=8)
    norm = CentredNorm(normal(D, seed=5), normal(D, seed=9), 1e-6)
    around = {"up_bias_F": biases[0], "down_bias_D": biases[1], "norm": norm, "residual_TD": residual_TD}
    run = jax.jit(lambda x: mlp(x, up, down, activation, **around))
    normed_TD = reference.layer_norm(x_TD, *norm)
    hidden_TF = reference.gate(activation, reference.int8_linear(normed_TD, up.unpack(), np.asarray(biases[0]), GROUP))
    expected_TD = reference.int8_linear(hidden_TF, down.unpack(), np.asarray(biases[1]), GROUP) + np.asarray(
        residual_TD
    )
    for _, y_TD in at_each_level(lambda: run(x_TD)):
        assert_close(y_TD, expected_TD, hidden_TF, down)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "gelu_new", "silu"])
def test_activations_are_exact_enough_far_and_near(activation):
    """Over numbers that one product passes on as they are."""
    x_T1, one = jnp.linspace(-12.0, 12.0, 4001)[:, None], pack_int8(quantize(jnp.ones((1, 1)), "int8"))
    expected = reference.gate(activation, np.asarray(x_T1, np.float64))
    for level, y_T1 in at_each_level(lambda: linear(x_T1, one, activation=activation)):
        np.testing.assert_allclose(y_T1, expected, atol=5e-5, rtol=1e-5, err_msg=level)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu"])
# Few rows, rows that threads share in stretches, and so many stretches that a thread takes some through all of it.
@pytest.mark.parametrize(("T", "D", "F"), [(1, 32, 16), (5, 50, 48), (200, 40, 112), (7, 64, 192), (900, 40, 112)])
def test_gated_mlp(T, D, F, activation):
    x_TD, gate_up, down = normal(T, D, scale=3.0), packed(2 * F, D), packed(D, F, seed=2)
    biases = normal(2 * F, seed=6), normal(D, seed=7)
    norm, residual_TD = RmsNorm(normal(D, seed=5), 1e-6), normal(T, D, seed=8)
    around = {"gate_up_bias": biases[0], "down_bias_D": biases[1], "norm": norm, "residual_TD": residual_TD}
    run = jax.jit(lambda x: gated_mlp(x, gate_up, down, activation, **around))
    normed_TD = reference.rms_norm(x_TD, norm.scale_I, norm.eps)
    hidden = reference.int8_linear(normed_TD, gate_up.unpack(), np.asarray(biases[0]), GROUP)
    hidden_TF = reference.gate(activation, hidden[:, :F]) * hidden[:, F:]
    expected_TD = reference.int8_linear(hidden_TF, down.unpack(), np.asarray(biases[1]), GROUP) + np.asarray(
        residual_TD
    )
    for _, y_TD in at_each_level(lambda: run(x_TD)):
        assert_close(y_TD, expected_TD, hidden_TF, down)


def test_large_gates_do_not_overflow():
    gate_up, down = packed(64, 16), packed(16, 32, seed=2)
    x_TD = normal(4, 16, scale=1e4)
    for _, y_TD in at_each_level(lambda: gated_mlp(x_TD, gate_up, down, "silu")):
        assert np.isfinite(y_TD).all()


def test_zero_rows_give_the_bias():
    weight, bias_O, norm = packed(40, 24), normal(40), RmsNorm(jnp.ones(24), 1e-6)
    for _, y_TO in at_each_level(lambda: linear(jnp.zeros((3, 24)), weight, bias_O, norm=norm)):
        np.testing.assert_array_equal(y_TO, np.tile(bias_O, (3, 1)))


@pytest.mark.parametrize("biased", [False, True])
def test_rows_of_zeros_between_others_change_no_bit_of_them(biased):
    """Padding is not multiplied: what is computed of the other rows is what is computed where there is none."""
    T, D, F = 120, 64, 112
    rng = np.random.default_rng(0)
    padding_T = np.zeros(T, bool)
    padding_T[[0, 1, 7, 8, 9, 30, 32, 34, 119]] = padding_T[40:100] = True
    full_TD, residual_TD = normal(T, D), normal(T, D, seed=8)
    padded_TD = jnp.where(padding_T[:, None], 0, full_TD)
    up, gate_up, down, norm = packed(70, D), packed(2 * F, D), packed(D, F, seed=2), RmsNorm(normal(D, seed=5), 1e-6)
    bias = jnp.asarray(rng.normal(size=2 * F), jnp.float32) if biased else None
    bias_O = bias[:70] if biased else None
    run = jax.jit(
        lambda x: (
            linear(x, up, bias_O, norm=norm),
            gated_mlp(x, gate_up, down, "silu", gate_up_bias=bias, norm=norm, residual_TD=residual_TD),
        )
    )
    for of in range(2):
        for (level, got), (_, whole) in zip(
            at_each_level(lambda of=of: run(padded_TD)[of]), at_each_level(lambda of=of: run(full_TD)[of]), strict=True
        ):
            np.testing.assert_array_equal(got[~padding_T], whole[~padding_T], err_msg=level)
            if of == 0:
                bias_1O = np.broadcast_to(bias_O if biased else 0.0, (1, 70))
                np.testing.assert_array_equal(got[padding_T], np.repeat(bias_1O, padding_T.sum(), 0))
            elif not biased:
                np.testing.assert_array_equal(got[padding_T], residual_TD[padding_T])
            else:
                assert np.abs(got[padding_T] - residual_TD[padding_T]).max() > 0.01, "gates have their biases"


def test_a_row_is_computed_the_same_however_many_others_there_are():
    """Threads share columns of few rows and have rows of their own where there are many."""
    D, F, T = 64, 112, 900
    x_TD, residual_TD = normal(T, D), normal(T, D, seed=8)
    up, gate_up, down, norm = packed(70, D), packed(2 * F, D), packed(D, F, seed=2), RmsNorm(normal(D, seed=5), 1e-6)
    run = jax.jit(
        lambda x, rest: (linear(x, up, norm=norm), gated_mlp(x, gate_up, down, "silu", norm=norm, residual_TD=rest))
    )
    whole = jax.tree.map(np.asarray, run(x_TD, residual_TD))
    for begin, end in ((0, 1), (5, 8), (7, 52), (100, 164), (300, 500)):
        for got, all_T in zip(run(x_TD[begin:end], residual_TD[begin:end]), whole, strict=True):
            np.testing.assert_array_equal(got, all_T[begin:end])


@pytest.mark.parametrize(("I", "rest"), [(250, 0.7), (256, 0.15)])  # a scale a group, and rotated too
def test_an_outlier_costs_others_little_precision(I, rest):
    weight, x_TI = packed(32, I), normal(4, I)
    loud_TI = x_TI.at[:, 3].set(1000.0)
    exact_TO = reference.linear(loud_TI, weight)
    plain = Int8Weight(*quantize_rows(weight.dequantize()))
    one_scale = np.abs(reference.int8_linear(loud_TI, plain) - exact_TO).mean()
    for _, y_TO in at_each_level(lambda: linear(loud_TI, weight)):
        assert np.abs(y_TO - exact_TO).mean() < rest * one_scale


def test_a_rotated_weight_has_whole_groups():
    weight = dataclasses.replace(packed(32, 50), rotated=True)
    with pytest.raises(Exception, match="multiple of 64"):
        jax.block_until_ready(linear(jnp.zeros((2, 50)), weight))


def test_every_level_gives_the_same_sums():
    x_TI, weight = normal(11, 200), packed(72, 200)
    results = [y_TO for _, y_TO in at_each_level(lambda: linear(x_TI, weight))]
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=1e-5)


@pytest.mark.parametrize("D", [30, 64])
def test_embed_reads_packed_rows(D):
    table = quantize(normal(50, D), "int8")
    tokens = jnp.array([[0, 17], [49, 3]])
    np.testing.assert_array_equal(embed(pack_int8(table), tokens), embed(table, tokens))
    assert not np.asarray(embed(pack_int8(table), jnp.array([50, 10**6]))).any()


def test_a_weight_of_another_shape_is_refused():
    weight = packed(32, 16)
    lying = PackedInt8Weight(weight.panels_PQci, weight.scale_O, weight.sums_PGc, (64, 16))
    with pytest.raises(Exception, match="packed for another shape"):
        jax.block_until_ready(linear(jnp.zeros((2, 16)), lying))


def test_a_result_that_no_cache_holds_is_the_same_numbers_row_by_row():
    """It is written past the caches, by blocks of many rows; two rows by themselves are not, and go another way."""
    x_TI, weight = normal(13, 4), packed(1 << 18, 4)
    y_TO = jax.jit(linear)(x_TI, weight)
    np.testing.assert_array_equal(y_TO[5:7], jax.jit(linear)(x_TI[5:7], weight))
