"""The drawn tokens against the distribution that the reference says they come from, by each body."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import native
from ops.sampling import PROMPT_BIT, Edits, apply_edits, choose, reference
from ops.sampling.draw import invert, uniform
from ops.sampling.threshold import threshold

choose = jax.jit(choose, static_argnames="body")

BODIES = ["xla", "generic", "avx2", "avx512"]  # plain XLA, and the native one by instruction set

FILTERS = [  # temperature, top_k, top_p, min_p
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.3, 0, 0.8, 0.0),
    (1.0, 0, 1.0, 0.1),
    (0.9, 7, 0.6, 0.02),
    (2.0, 1, 1.0, 0.0),
    (1.0, 0, 1e-6, 0.0),
]


@pytest.fixture(params=BODIES)
def body(request):
    """What `choose` takes; native ones run with the instruction set that the parameter names."""
    if request.param == "xla":
        yield "xla"
        return
    if not native.available():
        pytest.skip(native.status())
    if native.set_isa(request.param) != request.param:
        native.set_isa(None)
        pytest.skip(f"this CPU has no {request.param}")
    yield "native"
    native.set_isa(None)


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


def edits(rows, vocab, slots=1, **asked) -> Edits:
    """Edits that ask for nothing but what is named."""
    neutral = {
        "slot_R": np.zeros(rows, np.int32),
        "repetition_R": np.ones(rows, np.float32),
        "presence_R": np.zeros(rows, np.float32),
        "frequency_R": np.zeros(rows, np.float32),
        "biased_R": np.zeros(rows, bool),
        "held_back_R": np.zeros(rows, bool),
        "masked": np.asarray(False),
        "seen_NV": np.zeros((slots, vocab), np.int16),
        "bias_ids_NE": np.full((slots, 3), vocab, np.int32),
        "bias_values_NE": np.zeros((slots, 3), np.float32),
        "banned_ids_NE": np.full((slots, 2), vocab, np.int32),
        "mask_RW": np.zeros((rows, -(-vocab // 32)), np.int32),
    }
    return Edits(**{name: jnp.asarray(x) for name, x in (neutral | asked).items()})


def sample(body, logits_RV, asked: Edits | None = None, **args):
    asked = edits(*logits_RV.shape) if asked is None else asked
    return np.asarray(choose(jnp.asarray(logits_RV), asked, body=body, **args))


def random_logits(rows, vocab, spread=3.0, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, vocab)).astype(np.float32) * spread


@pytest.mark.parametrize("filters", FILTERS)
def test_draws_follow_the_distribution(body, filters):
    draws, vocab = 4000, 150
    logits_V = random_logits(1, vocab, 1.5)[0]
    p_V = reference.probabilities(logits_V, *filters)
    tokens = sample(body, np.tile(logits_V, (draws, 1)), **arguments([filters] * draws, np.arange(draws), step=7))
    seen_V = np.bincount(tokens, minlength=vocab)
    assert not seen_V[p_V == 0].any()
    expected_V = p_V * draws
    common = expected_V >= 5
    chi2 = np.sum((seen_V[common] - expected_V[common]) ** 2 / expected_V[common])
    freedom = max(int(common.sum()) - 1, 1)
    # The statistic's mean is its degrees of freedom, its deviation sqrt(2 * freedom): 5 deviations, fixed seeds.
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


def test_unlikely_tokens_of_a_large_vocabulary_are_reached(body):
    """Half of the weight lies on tokens of 1e-5 each: the draw must spread over all of their blocks, and inside them."""
    draws, vocab = 4000, 50_001
    logits_V = np.zeros(vocab, np.float32)
    logits_V[1234] = np.log(vocab)
    tokens = np.concatenate(
        [
            sample(body, np.tile(logits_V, (500, 1)), **arguments([FILTERS[0]] * 500, np.arange(500) + start))
            for start in range(0, draws, 500)
        ]
    )
    common = tokens == 1234
    assert abs(common.mean() - 0.5) < 5 * np.sqrt(0.25 / draws)
    rare = tokens[~common]
    for groups, group in ((16, rare * 16 // vocab), (16, rare % 64 // 4)):  # by place in the vocabulary, and in a block
        count = np.bincount(group, minlength=groups)
        chi2 = np.sum((count - len(rare) / groups) ** 2 / (len(rare) / groups))
        assert chi2 < groups - 1 + 5 * np.sqrt(2 * (groups - 1))


@pytest.mark.parametrize("vocab", [50, 4097, 20000])
@pytest.mark.parametrize("spread", [0.02, 1.0, 6.0])
def test_threshold_keeps_exactly_the_references_tokens(vocab, spread):
    cases = filter_cases(vocab)
    logits_RV = random_logits(len(cases), vocab, spread, seed=vocab)
    args = arguments(cases, np.zeros(len(cases)))
    x_RV = logits_RV - logits_RV.max(-1, keepdims=True)
    low_R = np.asarray(jax.jit(threshold)(x_RV, args["top_k_R"], args["top_p_R"], args["min_p_R"]))
    for row, case in enumerate(cases):
        p_V = reference.probabilities(logits_RV[row], *case)
        kept = int(np.sum(x_RV[row] >= low_R[row]))
        # float32 sums over thousands of tokens may move a top-p cut by a token in a thousand.
        slack = 0 if case[2] == 1.0 else 1 + kept // 1000
        assert abs(kept - int(np.sum(p_V > 0))) <= slack, case


def filter_cases(vocab):
    return [(1.0, k, p, m) for k in (0, 1, 40, vocab - 1) for p in (1.0, 0.95, 0.3) for m in (0.0, 0.05)]


@pytest.mark.parametrize("vocab", [50, 4097, 20000])
@pytest.mark.parametrize("spread", [0.02, 1.0, 6.0])
def test_bodies_draw_the_same_tokens(body, vocab, spread):
    """Each filter, cut at each scale of logits, with the same numbers: all but what rounding decides is equal."""
    if body == "xla":
        pytest.skip("it is what the others are compared with")
    cases = filter_cases(vocab) * 4
    logits_RV = random_logits(len(cases), vocab, spread, seed=vocab + 1)
    args = arguments(cases, np.arange(len(cases)))
    tokens_R, expected_R = sample(body, logits_RV, **args), sample("xla", logits_RV, **args)
    assert np.mean(tokens_R != expected_R) <= 0.02
    for row in np.flatnonzero(tokens_R != expected_R):  # and what differs is still likely enough to be drawn
        assert logits_RV[row, tokens_R[row]] >= logits_RV[row, expected_R[row]] - 0.01 * spread or cases[row][2] < 1


@pytest.mark.parametrize("vocab", [97, 5000])
def test_bodies_edit_alike(body, vocab):
    rows, slots = 40, 7
    rng = np.random.default_rng(vocab)
    seen_NV = rng.integers(0, 4, (slots, vocab)) * (rng.random((slots, vocab)) < 0.3)
    seen_NV |= np.where(rng.random((slots, vocab)) < 0.2, PROMPT_BIT, 0)
    some = [rng.random(rows) < 0.5 for _ in range(5)]
    asked = edits(
        rows,
        vocab,
        slot_R=rng.integers(0, slots, rows).astype(np.int32),
        repetition_R=np.where(some[0], 1.4, 1.0).astype(np.float32),
        presence_R=np.where(some[1], 0.8, 0.0).astype(np.float32),
        frequency_R=np.where(some[2], -0.3, 0.0).astype(np.float32),
        biased_R=some[3],
        held_back_R=some[4],
        masked=np.asarray(True),
        seen_NV=seen_NV.astype(np.int16),
        bias_ids_NE=rng.integers(-1, vocab + 1, (slots, 3)).astype(np.int32),
        bias_values_NE=np.asarray([5.0, -np.inf, 2.5], np.float32)[None].repeat(slots, 0),
        banned_ids_NE=rng.integers(0, vocab + 1, (slots, 2)).astype(np.int32),
        mask_RW=rng.integers(-(2**31), 2**31, (rows, -(-vocab // 32))).astype(np.int32),
    )
    logits_RV = random_logits(rows, vocab)
    edited_RV = np.asarray(apply_edits(jnp.asarray(logits_RV), asked))
    greedy = arguments([(0.0, 0, 1.0, 0.0)] * rows, np.arange(rows))
    np.testing.assert_array_equal(sample(body, logits_RV, asked, **greedy), edited_RV.argmax(-1))
    assert (edited_RV.argmax(-1) != logits_RV.argmax(-1)).mean() > 0.4
    drawn = arguments([(1.5, 30, 1.0, 0.0)] * rows, np.arange(rows))
    same_R = sample(body, logits_RV, asked, **drawn) == sample("xla", edited_RV, **drawn)
    assert same_R.mean() >= 0.95


def test_ties_are_all_kept_and_the_search_ends():
    x_RV = jnp.zeros((2, 9000)).at[1].set(-1.0).at[1, 17].set(0.0)
    low_R = threshold(x_RV, jnp.array([5, 2]), jnp.ones(2), jnp.zeros(2))
    np.testing.assert_array_equal(low_R, [0.0, -1.0])


def test_ties_may_all_be_drawn(body):
    logits_RV = np.zeros((400, 9000), np.float32)
    tokens = sample(body, logits_RV, **arguments([(1.0, 5, 0.5, 0.0)] * 400, np.arange(400)))
    assert len(set(tokens.tolist())) > 380


def test_greedy_takes_the_lowest_of_ties_and_ignores_filters(body):
    logits_RV = random_logits(3, 1000)
    logits_RV[1, [5, 900]] = 50.0
    greedy = [(0.0, 3, 0.5, 0.5)] * 3
    expected = logits_RV.argmax(-1)
    assert expected[1] == 5
    np.testing.assert_array_equal(sample(body, logits_RV, **arguments(greedy, np.arange(3))), expected)
    mixed = [(0.0, 3, 0.5, 0.5), (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0)]
    np.testing.assert_array_equal(sample(body, logits_RV, **arguments(mixed, np.arange(3)))[:2], expected[:2])


def test_a_row_never_depends_on_its_neighbours(body):
    rows, vocab = 24, 12000
    logits_RV = random_logits(rows, vocab, 0.5)
    filters = [FILTERS[i % len(FILTERS)] if i % 5 else (0.0, 0, 1.0, 0.0) for i in range(rows)]
    args = arguments(filters, np.arange(rows) * 17, step=3)
    together_R = sample(body, logits_RV, **args)
    for start, stop in ((0, 1), (1, 2), (5, 12), (23, 24)):
        alone = {name: value[start:stop] for name, value in args.items()}
        np.testing.assert_array_equal(sample(body, logits_RV[start:stop], **alone), together_R[start:stop])


def test_steps_and_seeds_give_new_numbers():
    seeds_R2 = jnp.array([[0, 1], [0, 2], [1, 1]], jnp.uint32)
    first = np.asarray(uniform(seeds_R2, jnp.array([0, 0, 0])))
    second = np.asarray(uniform(seeds_R2, jnp.array([1, 1, 1])))
    assert len({*first.ravel().tolist(), *second.ravel().tolist()}) == 12
    np.testing.assert_array_equal(uniform(seeds_R2[1:2], jnp.array([1]))[0], second[1])


def test_forbidden_tokens_are_never_drawn(body):
    logits_RV = np.full((64, 500), -np.inf, np.float32)
    logits_RV[:, 77] = -3.0
    tokens = sample(body, logits_RV, **arguments([FILTERS[i % len(FILTERS)] for i in range(64)], np.arange(64)))
    assert (tokens == 77).all()


@pytest.mark.parametrize("value", [-np.inf, np.nan, np.inf])
def test_rows_that_are_not_logits_give_some_token(body, value):
    """The engine fails such rows by looking at the logits; the draw must only end, with an id that exists."""
    filters = [*FILTERS, (0.0, 0, 1.0, 0.0), (1.0, 400, 0.5, 0.0)]
    logits_RV = np.full((2 * len(filters), 500), value, np.float32)
    logits_RV[::2, 100:300] = random_logits(len(filters), 200)
    tokens = sample(body, logits_RV, **arguments([f for f in filters for _ in range(2)], np.arange(len(logits_RV))))
    assert ((tokens >= 0) & (tokens < 500)).all()


def test_invert_reaches_both_ends():
    weight_RV = jnp.zeros((4, 300)).at[:, 3].set(1.0).at[:, 299].set(1.0)
    near_one = 1.0 - 2.0**-24
    tokens = invert(weight_RV, jnp.array([[0.0, 0.0], [0.4999, near_one], [0.5, 0.0], [near_one, near_one]]))
    np.testing.assert_array_equal(tokens, [3, 3, 299, 299])
    weight_RV = jnp.zeros((2, 300)).at[:, 65].set(1.0).at[:, 66].set(3.0)
    np.testing.assert_array_equal(invert(weight_RV, jnp.array([[0.9, 0.24], [0.1, 0.26]])), [65, 66])
