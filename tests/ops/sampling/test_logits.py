"""Penalties, masks, biases and logprobs against the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import native
from ops.sampling import apply_bias, apply_penalties, apply_token_mask, logprobs, reference

VOCAB = 203


def logits(rows=4):
    return np.random.default_rng(1).normal(size=(rows, VOCAB)).astype(np.float32) * 4


def test_penalties():
    logits_RV = logits()
    prompts = [[1, 2, 3], [], [5, 5, 202], [0]]
    outputs = [[2, 2, 9], [7], [], [0, 1, 0]]
    values = [(1.3, 0.5, 0.2), (1.0, -1.0, 2.0), (0.7, 0.0, 0.0), (2.0, 2.0, -0.5)]
    mask_RV = np.zeros((4, VOCAB), bool)
    counts_RV = np.zeros((4, VOCAB), np.int32)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        mask_RV[row, prompt] = True
        np.add.at(counts_RV[row], output, 1)
    repetition, presence, frequency = jnp.asarray(np.array(values, np.float32).T)
    got_RV = apply_penalties(
        logits_RV,
        prompt_mask_RV=mask_RV,
        output_counts_RV=counts_RV,
        repetition_R=repetition,
        presence_R=presence,
        frequency_R=frequency,
    )
    for row in range(4):
        expected_V = reference.penalized(logits_RV[row], prompts[row], outputs[row], *values[row])
        np.testing.assert_allclose(got_RV[row], expected_V, rtol=1e-5, atol=1e-5)


def test_token_mask():
    logits_RV = logits(2)
    allowed = [{0, 31, 32, 64, 202}, set(range(0, VOCAB, 3))]
    bitmask_RW = np.zeros((2, 9), np.uint32)  # wider than needed, as a padded vocabulary's is
    for row, ids in enumerate(allowed):
        for token in ids:
            bitmask_RW[row, token // 32] |= np.uint32(1 << token % 32)
    got_RV = np.asarray(apply_token_mask(logits_RV, jnp.asarray(bitmask_RW.view(np.int32))))
    for row, ids in enumerate(allowed):
        assert set(np.flatnonzero(np.isfinite(got_RV[row]))) == ids
        np.testing.assert_array_equal(got_RV[row, sorted(ids)], logits_RV[row, sorted(ids)])


def test_bias_drops_padding():
    logits_RV = logits(2)
    ids_RN = jnp.array([[3, 3, -1], [202, VOCAB, 0]])
    values_RN = jnp.array([[1.0, 2.0, 99.0], [-jnp.inf, 99.0, -4.0]])
    expected_RV = logits_RV.copy()
    expected_RV[0, 3] += 3.0
    expected_RV[1, 202] = -np.inf
    expected_RV[1, 0] -= 4.0
    np.testing.assert_allclose(apply_bias(jnp.asarray(logits_RV), ids_RN, values_RN), expected_RV, rtol=1e-6)


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
@pytest.mark.parametrize("vocab", [25, 203, 5000])
@pytest.mark.parametrize("body", ["xla", "native"])
def test_logprobs(body, vocab, num_top):
    if body == "native" and not native.available():
        pytest.skip(native.status())
    rng = np.random.default_rng(vocab)
    # Rounded logits, so that there are ties.
    logits_RV = np.round(rng.normal(size=(3, vocab)) * 3, 1).astype(np.float32)
    tokens_R = rng.integers(0, vocab, 3)
    run = jax.jit(logprobs, static_argnames=("num_top", "body"))
    asked_R = jnp.array([True, False, True])
    chosen_R, rank_R, top_ids_RN, top_values_RN = run(logits_RV, jnp.asarray(tokens_R), num_top, asked_R, body=body)
    assert top_ids_RN.shape == (3, num_top)
    for row in (0, 2):
        chosen, rank, ids, values = reference.logprobs(logits_RV[row], tokens_R[row], num_top)
        np.testing.assert_allclose(chosen_R[row], chosen, atol=1e-5)
        assert rank_R[row] == rank
        np.testing.assert_array_equal(top_ids_RN[row], ids)
        np.testing.assert_allclose(top_values_RN[row], values, atol=1e-5)
