"""Each token with its own adapter: both bodies against a loop over tokens."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from ops import native as native_kernels
from ops.lora import LoraStack, add_lora, add_lora_rows

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
    out = jax.jit(add_lora)(y, x, dataclasses.replace(stack, native=native), slots)
    np.testing.assert_allclose(np.asarray(out), want, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(out)[slots == 0], y[slots == 0])


@pytest.mark.parametrize("level", ["generic", "avx2", "avx512"])
def test_every_instruction_set_computes_the_same(level):
    if not native_kernels.available():
        pytest.skip(native_kernels.status())
    (y, x, stack, slots), want = arguments("odd_sizes")
    try:
        if native_kernels.set_isa(level) != level:
            pytest.skip(f"this CPU has no {level}")
        out = jax.jit(add_lora)(y, x, dataclasses.replace(stack, native=True), slots)
        np.testing.assert_allclose(np.asarray(out), want, rtol=1e-4, atol=1e-3)
    finally:
        native_kernels.set_isa(None)


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
