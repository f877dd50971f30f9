"""Each token with its own adapter: both bodies against a loop over tokens."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import native as native_kernels
from ops.activation import gated
from ops.linear import gated_mlp, linear, quantize
from ops.lora import Adapters, LoraStack, add_lora, add_lora_rows, paired
from ops.norm import RmsNorm

SHAPES = {  # T, I, O, N, R
    "one_token": (1, 64, 48, 3, 8),
    "odd_sizes": (7, 37, 29, 4, 5),
    "one_adapter": (33, 64, 64, 2, 16),
    "many": (70, 48, 1100, 5, 24),
}


def arguments(shape, seed=0):
    T, I, O, N, R = SHAPES[shape]
    rng = np.random.default_rng(seed)
    y, x = rng.standard_normal((T, O), np.float32), rng.standard_normal((T, I), np.float32)
    a, b = rng.standard_normal((N, R, I), np.float32), rng.standard_normal((N, R, O), np.float32)
    a[0] = b[0] = np.nan  # nobody's
    slots = rng.integers(0, N, T).astype(np.int32)
    want = y.astype(np.float64)
    for t, slot in enumerate(slots):
        if slot:
            want[t] += (a[slot].astype(np.float64) @ x[t]) @ b[slot]
    return (y, x, LoraStack(a, b), slots), want


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_token_has_its_own_adapter(shape, native):
    if native and not native_kernels.available():
        pytest.skip(native_kernels.status())
    (y, x, stack, slots), want = arguments(shape)
    out = jax.jit(add_lora)(y, x, Adapters(dataclasses.replace(stack, native=native), slots))
    np.testing.assert_allclose(np.asarray(out), want, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(out)[slots == 0], y[slots == 0])


def on_native(a, b, stretches=()):
    """A stack as the native kernels read it."""
    if b.dtype == jnp.bfloat16:
        b = jnp.asarray(np.stack([paired(np.asarray(one, np.float32)) for one in b]), b.dtype)
    return LoraStack(a, b, True, stretches)


LEVELS = ["generic", "avx2", "avx512", "bf16"]


@contextlib.contextmanager
def instruction_set(level):
    if not native_kernels.available():
        pytest.skip(native_kernels.status())
    try:
        if native_kernels.set_isa(level) != level:
            pytest.skip(f"this CPU has no {level}")
        yield
    finally:
        native_kernels.set_isa(None)


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_computes_the_same(level):
    (y, x, stack, slots), want = arguments("odd_sizes")
    with instruction_set(level):
        out = jax.jit(add_lora)(y, x, Adapters(dataclasses.replace(stack, native=True), slots))
        np.testing.assert_allclose(np.asarray(out), want, rtol=1e-4, atol=1e-3)


STRETCHES = ((5, 1), (70, 0), (71, 2), (600, 1), (1100, 0))
"""Columns of three tensors in one weight, tensor 0 in two places."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("level", [None, *LEVELS])
def test_columns_of_several_tensors(level, dtype):
    """B has each column's own ranks alone, five of fifteen; None is the plain body."""
    T, I, r = 37, 45, 5  # odd: the last pair of ranks and the last pair of inputs have one number
    rng = np.random.default_rng(3)
    y, x = rng.standard_normal((T, 1100), np.float32), rng.standard_normal((T, I), np.float32)
    a, b = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((4, 3 * r, I), (4, r, 1100)))
    slots = np.sort(rng.integers(0, 4, T)).astype(np.int32)[rng.permutation(T)]
    want, begin = y.astype(np.float64), 0
    hidden = np.einsum("ti,tri->tr", x.astype(np.float64), np.asarray(a, np.float64)[slots])
    for end, piece in STRETCHES:
        own, of_b = hidden[:, piece * r : (piece + 1) * r], np.asarray(b, np.float64)[slots][:, :, begin:end]
        want[:, begin:end] += np.einsum("tr,tro->to", own, of_b) * (slots > 0)[:, None]
        begin = end
    stack = on_native(a, b, STRETCHES) if level is not None else LoraStack(a, b, False, STRETCHES)
    exact = {"rtol": 1e-4, "atol": 1e-3}
    rounds = dtype == "bfloat16" and level in (None, "bf16")  # x and x A^T too, to three digits
    with contextlib.nullcontext() if level is None else instruction_set(level):
        out = np.asarray(jax.jit(add_lora)(y, x, Adapters(stack, slots)))
        np.testing.assert_allclose(out, want, **({"rtol": 0.02, "atol": 0.3} if rounds else exact))
        np.testing.assert_array_equal(out[slots == 0], y[slots == 0])
        if level is not None:  # a row is the same to the last bit, alone and among others
            alone = jax.jit(add_lora)(y[7:8], x[7:8], Adapters(stack, slots[7:8]))
            np.testing.assert_array_equal(np.asarray(alone)[0], out[7])


def test_a_table_of_tokens():
    rng = np.random.default_rng(1)
    T, V, D, N, R = 9, 20, 12, 3, 4
    x, tokens = rng.standard_normal((T, D), np.float32), rng.integers(0, V, T).astype(np.int32)
    a, b = rng.standard_normal((N, R, V), np.float32), rng.standard_normal((N, R, D), np.float32)
    slots = np.array([0, 1, 2, 0, 1, 2, 1, 1, 0], np.int32)
    out = np.asarray(jax.jit(add_lora_rows)(x, tokens, LoraStack(a, b), slots))
    for t, slot in enumerate(slots):
        want = x[t] + (a[slot, :, tokens[t]] @ b[slot] if slot else 0)
        np.testing.assert_allclose(out[t], want, rtol=1e-5, atol=1e-5)


# Products of int8 weights take adapters along in their own kernels: the same as adding them behind.

ROUNDED = {"rtol": 0.02, "atol": 0.3}
EXACT = {"rtol": 1e-4, "atol": 2e-3}


def normal(*shape, seed, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def change(x, stack, slots):
    """In float64, of what x is given as."""
    hidden = np.einsum("ti,tri->tr", np.asarray(x, np.float64), np.asarray(stack.a_NRI, np.float64)[slots])
    b, r = np.asarray(stack.b_NRO, np.float64)[slots], stack.b_NRO.shape[1]
    found, begin = np.zeros((len(slots), b.shape[2])), 0
    for end, piece in stack.stretches or ((b.shape[2], 0),):
        found[:, begin:end] = np.einsum("tr,tro->to", hidden[:, piece * r :][:, :r], b[:, :, begin:end])
        begin = end
    return found * (slots > 0)[:, None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("T", [1, 210])
def test_int8_products_take_adapters_along(T, level, dtype):
    I, O, r, stretches = 64, 200, 5, ((70, 1), (71, 2), (200, 0))
    with instruction_set(level):
        weight = quantize(normal(O, I, seed=1), "int8").packed()
        x, bias, residual = normal(T, I, seed=2), normal(O, seed=3), normal(T, O, seed=4)
        around = {"norm": RmsNorm(normal(I, seed=5), 1e-5), "residual_TO": residual}
        a, b = normal(4, 3 * r, I, seed=6, dtype=dtype), normal(4, r, O, seed=7, dtype=dtype)
        stack, slots = on_native(a, b, stretches), np.arange(3, 3 + T).astype(np.int32) * 7 % 4
        assert weight.takes(stack)
        want = linear(x, weight, bias, **around) + change(around["norm"](x), LoraStack(a, b, False, stretches), slots)
        run = jax.jit(lambda x, slots, residual: linear(
            x, weight, bias, norm=around["norm"], residual_TO=residual, adapters=Adapters(stack, slots)
        ))  # fmt: skip
        found = np.asarray(run(x, slots, residual))
        np.testing.assert_allclose(found, want, **(ROUNDED if dtype == "bfloat16" and level == "bf16" else EXACT))
        if T > 1:  # a row is the same to the last bit, alone and among others
            np.testing.assert_array_equal(np.asarray(run(x[199:200], slots[199:200], residual[199:200]))[0], found[199])


@pytest.mark.parametrize("level", LEVELS)
def test_int8_gated_blocks_take_adapters_along(level):
    T, D, F, r = 210, 64, 48, 4  # more rows than go through the block at once
    gate_up, down = (
        quantize(normal(*shape, seed=seed), "int8").packed() for seed, shape in ((1, (2 * F, D)), (2, (D, F)))
    )
    x, norm, residual = normal(T, D, seed=3), RmsNorm(normal(D, seed=4), 1e-5), normal(T, D, seed=5)
    slots = np.arange(T).astype(np.int32) * 5 % 3
    first = LoraStack(0.1 * normal(3, 2 * r, D, seed=6), normal(3, r, 2 * F, seed=7), True, ((F, 0), (2 * F, 1)))
    second = LoraStack(0.1 * normal(3, r, F, seed=8), normal(3, r, D, seed=9), True)
    run = jax.jit(lambda shards: gated_mlp(
        x, gate_up, down, "silu", norm=norm, residual_TD=residual, shards=shards,
        adapters=(Adapters(first, slots), Adapters(second, slots)),
    ), static_argnums=0)  # fmt: skip
    with instruction_set(level):
        hidden = gated(linear(x, gate_up, norm=norm) + change(norm(x), first, slots), "silu")
        want = linear(hidden, down, residual_TO=residual) + change(hidden, second, slots)
        # Hidden values on the edge between two numbers of int8 may be rounded the other way.
        np.testing.assert_allclose(np.asarray(run(1)), want, rtol=1e-3, atol=0.05)


def test_nobody_with_an_adapter_costs_a_product_nothing():
    weight, stack = (
        quantize(normal(48, 64, seed=1), "int8").packed(),
        LoraStack(*(normal(2, 4, n, seed=2) for n in (64, 48)), True),
    )
    x = normal(3, 64, seed=3)
    alone = linear(x, weight, adapters=Adapters(stack, jnp.zeros(3, jnp.int32)))
    np.testing.assert_array_equal(alone, linear(x, weight))
