"""Every body of every recurrent op against the reference, over one table of steps; what padding may not touch."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from ops import native as native_kernels
from ops.recurrent import native, reference, xla
from ops.recurrent.cases import TEST_CASES, Case, make_batch

BODIES = {"xla": xla, "native": native}
COMPILED = ("decode_several", "verify", "chunk_rows", "mixed")
"""The cases that plain XLA runs for every op; the others for one: each is a program to compile."""
LEVELS = ("generic", "avx2", "avx512")
H, K, n, p, D, N = 4, 2, 24, 32, 48, 5


@pytest.fixture(params=BODIES)
def body(request):
    if request.param == "native" and not native_kernels.available():
        pytest.skip(native_kernels.status())
    return BODIES[request.param]


def operands(name, batch, rng):
    T, S = batch.num_tokens, int(max(batch.decode_slot_B.max(initial=0), batch.chunk_slot_R.max(initial=0))) + 3

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    if name == "short_conv":
        return normal(T, D), normal(4, D), normal(D), normal(S, 3, D)
    if name == "selective_scan":
        dt = np.abs(normal(T, D)) * 0.3
        return normal(T, D), dt, -np.exp(normal(N, D)), normal(T, N), normal(T, N), normal(S, N, D)
    k = normal(T, K, n)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    decay = -np.abs(normal(T, H, n) if "channel" in name else normal(T, H))
    beta = 1 / (1 + np.exp(-normal(T, H))) if "delta" in name else None
    return normal(T, K, n), k, normal(T, H, p), decay, beta, normal(S, H, n, p)


OPS = {
    "short_conv": "short_conv",
    "gated_delta": "matrix_recurrence",
    "channel_delta": "matrix_recurrence",
    "gated_sum": "matrix_recurrence",
    "channel_sum": "matrix_recurrence",
    "selective_scan": "selective_scan",
}


def run(module, name, args, batch):
    function = getattr(module, OPS[name])
    extra = ("silu",) if name == "short_conv" else ()
    return jax.jit(lambda args, batch: function(*args, batch, *extra))(args, batch)


def compare(name, module, case, seed=0, **tolerance):
    batch = make_batch(TEST_CASES[case], seed)
    args = operands(name, batch, np.random.default_rng(seed))
    state = args[-1].copy()
    want_out, want_state = getattr(reference, OPS[name])(*args, batch)
    out, new = run(module, name, args, batch)
    real = sorted(t for s in reference.sequences(batch) for t in (*s.kept, *s.shown))
    np.testing.assert_allclose(np.asarray(out)[real], want_out[real], **tolerance)
    np.testing.assert_allclose(np.asarray(new), want_state, **tolerance)
    touched = {s.slot for s in reference.sequences(batch)}
    dummy = TEST_CASES[case].num_slots - 1
    for slot in set(range(state.shape[0])) - touched - {dummy}:
        np.testing.assert_array_equal(np.asarray(new)[slot], state[slot])


@pytest.mark.parametrize(
    ("name", "case"), [(n, c) for n in OPS for c in TEST_CASES if c in COMPILED or n == "gated_delta"]
)
def test_xla_agrees_with_the_reference(name, case):
    compare(name, xla, case, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("case", TEST_CASES)
@pytest.mark.parametrize("name", OPS)
def test_the_native_body_agrees_with_the_reference(name, case):
    if not native_kernels.available():
        pytest.skip(native_kernels.status())
    compare(name, native, case, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", OPS)
def test_every_instruction_set_computes_the_same(name, level):
    if not native_kernels.available():
        pytest.skip(native_kernels.status())
    try:
        if native_kernels.set_isa(level) != level:
            pytest.skip(f"this CPU has no {level}")
        compare(name, native, "mixed", rtol=2e-4, atol=2e-4)
    finally:
        native_kernels.set_isa(None)


@pytest.mark.parametrize("name", ["short_conv", "gated_delta", "selective_scan"])
def test_pieces_make_the_whole(body, name):
    """A prompt in one step, and in pieces with decode steps behind, ends in the same state and output."""
    rng = np.random.default_rng(1)
    whole = make_batch(Case(chunks=((0, 90),)))
    args = operands(name, whole, rng)
    out, state = run(body, name, args, whole)
    slot, got, now, at = int(whole.chunk_slot_R[0]), [], args[-1], 0
    per_token = {"short_conv": (0,), "selective_scan": (0, 1, 3, 4)}.get(name, (0, 1, 2, 3, 4))
    for size in (33, 1, 50, 1, 1, 1, 3):
        step = Case(decode=((at, 1),)) if size == 1 else Case(chunks=((at, size),))
        batch = make_batch(step)
        mine = {"decode_slot_B" if size == 1 else "chunk_slot_R": np.array([slot], np.int32)}
        batch = dataclasses.replace(batch, **mine)
        piece = []
        for i, x in enumerate(args[:-1]):
            if i in per_token and x is not None:
                cut = np.zeros((batch.num_tokens, *x.shape[1:]), x.dtype)
                cut[:size] = x[at : at + size]
                x = cut
            piece.append(x)
        part, now = run(body, name, (*piece, np.asarray(now)), batch)
        got.append(np.asarray(part)[:size])
        at += size
    np.testing.assert_allclose(np.concatenate(got), np.asarray(out)[:90], rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(np.asarray(now)[slot], np.asarray(state)[slot], rtol=2e-4, atol=2e-4)


def test_a_state_of_another_dtype_keeps_it():
    batch = make_batch(TEST_CASES["mixed"])
    args = operands("gated_delta", batch, np.random.default_rng(0))
    narrow = args[-1].astype(jax.numpy.bfloat16)
    with pytest.raises(NotImplementedError):
        run(native, "gated_delta", (*args[:-1], narrow), batch)
    _, state = run(xla, "gated_delta", (*args[:-1], narrow), batch)
    assert state.dtype == jax.numpy.bfloat16
