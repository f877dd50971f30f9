"""The drawn tokens against the distribution that the reference says they come from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.sampling import reference, sample
from ops.sampling.draw import invert, uniform
from ops.sampling.threshold import threshold

sample = jax.jit(sample)

FILTERS = [  # temperature, top_k, top_p, min_p
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.3, 0, 0.8, 0.0),
    (1.0, 0, 1.0, 0.1),
    (0.9, 7, 0.6, 0.02),
    (2.0, 1, 1.0, 0.0),
    (1.0, 0, 1e-6, 0.0),
]


def arguments(filters, seeds, step=0):
    temperature, top_k, top_p, min_p = (np.array(column) for column in zip(*filters, strict=True))
    key_R2 = np.stack([np.zeros(len(filters)), seeds], axis=1)
    return {
        "temperature_R": jnp.asarray(temperature, jnp.float32),
        "top_k_R": jnp.asarray(top_k, jnp.int32),
        "top_p_R": jnp.asarray(top_p, jnp.float32),
        "min_p_R": jnp.asarray(min_p, jnp.float32),
        "seed_R2": jnp.asarray(key_R2, jnp.uint32),
        "step_R": jnp.full(len(filters), step, jnp.int32),
    }


def random_logits(rows, vocab, spread=3.0, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, vocab)).astype(np.float32) * spread


@pytest.mark.parametrize("filters", FILTERS)
def test_draws_follow_the_distribution(filters):
    draws, vocab = 4000, 150
    logits_V = random_logits(1, vocab, 1.5)[0]
    p_V = reference.probabilities(logits_V, *filters)
    tokens = np.asarray(
        sample(jnp.tile(logits_V, (draws, 1)), **arguments([filters] * draws, np.arange(draws), step=7))
    )
    seen_V = np.bincount(tokens, minlength=vocab)
    assert not seen_V[p_V == 0].any()
    expected_V = p_V * draws
    common = expected_V >= 5
    chi2 = np.sum((seen_V[common] - expected_V[common]) ** 2 / expected_V[common])
    freedom = max(int(common.sum()) - 1, 1)
    # The statistic's mean is its degrees of freedom, its deviation sqrt(2 * freedom): 5 deviations, fixed seeds.
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("vocab", [50, 4097, 20000])
@pytest.mark.parametrize("spread", [0.02, 1.0, 6.0])
def test_threshold_keeps_exactly_the_references_tokens(vocab, spread):
    cases = [(1.0, k, p, m) for k in (0, 1, 40, vocab - 1) for p in (1.0, 0.95, 0.3) for m in (0.0, 0.05)]
    logits_RV = random_logits(len(cases), vocab, spread, seed=vocab)
    args = arguments(cases, np.zeros(len(cases)))
    low_R = np.asarray(
        jax.jit(threshold)(logits_RV, logits_RV.max(-1), args["top_k_R"], args["top_p_R"], args["min_p_R"])
    )
    for row, case in enumerate(cases):
        p_V = reference.probabilities(logits_RV[row], *case)
        kept = int(np.sum(logits_RV[row] >= low_R[row]))
        # float32 sums over thousands of tokens may move a top-p cut by a token in a thousand.
        slack = 0 if case[2] == 1.0 else 1 + kept // 1000
        assert abs(kept - int(np.sum(p_V > 0))) <= slack, case


def test_ties_are_all_kept_and_the_search_ends():
    logits_RV = jnp.zeros((2, 9000)).at[1, 17].set(1.0)
    low_R = threshold(logits_RV, logits_RV.max(-1), jnp.array([5, 2]), jnp.ones(2), jnp.zeros(2))
    np.testing.assert_array_equal(low_R, [0.0, 0.0])


def test_greedy_takes_the_lowest_of_ties_and_ignores_filters():
    logits_RV = random_logits(3, 1000)
    logits_RV[1, [5, 900]] = 50.0
    greedy = [(0.0, 3, 0.5, 0.5)] * 3
    expected = logits_RV.argmax(-1)
    assert expected[1] == 5
    np.testing.assert_array_equal(sample(logits_RV, **arguments(greedy, np.arange(3))), expected)
    mixed = [(0.0, 3, 0.5, 0.5), (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0)]
    np.testing.assert_array_equal(sample(logits_RV, **arguments(mixed, np.arange(3)))[:2], expected[:2])


def test_a_row_never_depends_on_its_neighbours():
    rows, vocab = 24, 12000
    logits_RV = random_logits(rows, vocab, 0.5)
    filters = [FILTERS[i % len(FILTERS)] if i % 5 else (0.0, 0, 1.0, 0.0) for i in range(rows)]
    args = arguments(filters, np.arange(rows) * 17, step=3)
    together_R = np.asarray(sample(logits_RV, **args))
    for start, stop in ((0, 1), (1, 2), (5, 12), (23, 24)):
        alone = {name: value[start:stop] for name, value in args.items()}
        np.testing.assert_array_equal(sample(logits_RV[start:stop], **alone), together_R[start:stop])


def test_steps_and_seeds_give_new_numbers():
    seeds_R2 = jnp.array([[0, 1], [0, 2], [1, 1]], jnp.uint32)
    first = np.asarray(uniform(seeds_R2, jnp.array([0, 0, 0])))
    second = np.asarray(uniform(seeds_R2, jnp.array([1, 1, 1])))
    assert len({*first.tolist(), *second.tolist()}) == 6
    np.testing.assert_array_equal(uniform(seeds_R2[1:2], jnp.array([1])), second[1:2])


def test_forbidden_tokens_are_never_drawn():
    logits_RV = np.full((64, 500), -np.inf, np.float32)
    logits_RV[:, 77] = -3.0
    tokens = sample(logits_RV, **arguments([FILTERS[i % len(FILTERS)] for i in range(64)], np.arange(64)))
    assert (np.asarray(tokens) == 77).all()


def test_invert_reaches_both_ends():
    weight_RV = jnp.zeros((4, 300)).at[:, 3].set(1.0).at[:, 299].set(1.0)
    tokens = invert(weight_RV, jnp.array([0.0, 0.4999, 0.5, 1.0 - 2.0**-24]))
    np.testing.assert_array_equal(tokens, [3, 3, 299, 299])
