"""Gated DeltaNet between its projections: one kernel, and its parts, against the reference."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from ops import native as kernels
from ops.recurrent import native, reference
from ops.recurrent.cases import TEST_CASES, make_batch
from ops.recurrent.gated_delta import DeltaWeights, gated_delta

K, EPS = 2, 1e-5
SHAPES = {"wide": (2, 32, 128), "narrow": (3, 16, 48)}
"""G value heads a key head, n, p: a row of the state as registers hold it, and one that they do not."""


def operands(shape, batch, seed):
    G, n, p = SHAPES[shape]
    rng = np.random.default_rng(seed)

    def normal(*dims, by=1.0):
        return (by * rng.standard_normal(dims)).astype(np.float32)

    T, S = batch.num_tokens, int(max(batch.decode_slot_B.max(initial=0), batch.chunk_slot_R.max(initial=0))) + 3
    H, C = K * G, K * (2 * n + G * p)
    own = normal(4, C, by=0.5), -np.exp(normal(H)), normal(H), normal(p)
    weights = DeltaWeights(*own, EPS, 2.0)  # pyright: ignore[reportArgumentType]
    return normal(T, C + H * p), normal(T, 2 * H), weights, normal(S, 3, C), normal(S, H, n, p)


def compare(shape, case, seed=0):
    batch = make_batch(TEST_CASES[case], seed)
    x, gates, weights, conv, matrix = operands(shape, batch, seed)
    before = conv.copy(), matrix.copy()
    want = reference.gated_delta(x, gates, weights, conv, matrix, batch, K)
    own = {name: getattr(weights, name) for name in DeltaWeights._fields[:4]}  # the others are static
    run = jax.jit(lambda x, gates, own, *rest: gated_delta(x, gates, weights._replace(**own), *rest, key_heads=K))
    got = [np.asarray(part) for part in run(x, gates, own, conv, matrix, batch)]
    real = sorted(t for s in reference.sequences(batch) for t in (*s.kept, *s.shown))
    np.testing.assert_allclose(got[0][real], want[0][real], rtol=3e-4, atol=3e-4)
    touched = {s.slot for s in reference.sequences(batch)}
    for new, wanted, old in zip(got[1:], want[1:], before, strict=True):
        np.testing.assert_allclose(new, wanted, rtol=3e-4, atol=3e-4)
        for slot in set(range(len(old))) - touched - {TEST_CASES[case].num_slots - 1}:
            np.testing.assert_array_equal(new[slot], old[slot])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", TEST_CASES)
def test_the_kernel_agrees_with_the_reference(shape, case):
    if not kernels.available():
        pytest.skip(kernels.status())
    compare(shape, case)


@pytest.mark.parametrize("level", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("case", ["mixed", "verify"])
def test_every_instruction_set_computes_the_same(level, case):
    if not kernels.available():
        pytest.skip(kernels.status())
    try:
        if kernels.set_isa(level) != level:
            pytest.skip(f"this CPU has no {level}")
        compare("wide", case)
    finally:
        kernels.set_isa(None)


def test_its_parts_agree_with_the_reference(monkeypatch):
    def declines(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(native, "gated_delta", declines)
    compare("wide", "mixed")
