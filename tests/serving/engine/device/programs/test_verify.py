"""Which drafts become tokens: the same tokens as without drafts, from the same distribution, at every place of a row."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import chi2

from ops import sampling
from serving.engine.device.programs.packing import sample_layout
from serving.engine.device.programs.state import DeviceState
from serving.engine.device.programs.steps import sample_rows
from serving.engine.device.programs.verify import accept, drafts_before
from serving.engine.requests.slots import COLUMNS

V, K, DRAWS = 12, 3, 100_000


def test_a_chain_of_equal_tokens_is_accepted_and_one_more():
    place = jnp.array([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0])
    draft = jnp.array([5, 6, 7, -1, 5, 6, 7, -1, 5, -1, -1, -1, -1])
    token = jnp.array([5, 6, 7, 8, 5, 9, 7, 8, 5, 4, 0, 0, 2])
    taken, last = accept(token, draft, place)
    assert np.where(taken, token, -1).tolist() == [5, 6, 7, 8, 5, 9, -1, -1, 5, 4, -1, -1, 2]
    assert np.flatnonzero(last).tolist() == [3, 5, 9, 12]
    before = drafts_before(draft, place, 3)
    assert before[:5].tolist() == [[-1] * 3, [5, -1, -1], [5, 6, -1], [5, 6, 7], [-1] * 3]
    assert before[12].tolist() == [-1] * 3


class Head:
    """A model whose logits depend on the token that a place begins with: hidden states are one-hot."""

    def __init__(self) -> None:
        self.table = jnp.asarray(np.random.default_rng(1).normal(size=(V, V)) * 1.5, jnp.float32)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return hidden @ self.table


@functools.cache
def program(drafts: int, body: sampling.Body):
    def run(f, state, hidden, mask):
        return sample_rows(Head(), f, state, hidden, mask, body, None, drafts)

    return jax.jit(run)


def fields(rows: int, drafts: bool, **given) -> dict[str, np.ndarray]:
    """Rows of `sample_layout` of requests that ask for nothing but what is given."""
    layout = sample_layout(rows, drafts)
    f = layout.views(np.zeros(layout.size, np.int32))
    for column in COLUMNS:
        f[f"{column.name}_S"][:] = column.neutral
    f["slot_S"][:], f["temperature_S"][:] = 0, 1.0
    for name, value in given.items():
        f[name][:] = value
    return f


def seeds(count: int) -> np.ndarray:
    return np.stack([np.full(count, 3), np.arange(count)], axis=1).astype(np.uint32)


CASES = {
    "plain": {},
    "warm": {"temperature_S": 0.6},
    "top-k": {"top_k_S": 4},
    "top-p": {"top_p_S": 0.7},
    "min-p": {"min_p_S": 0.2},
    "penalties": {"repetition_S": 1.4, "presence_S": 0.6, "frequency_S": 0.3},
    "bias": {"biased_S": 1},
    "min-tokens": {"min_tokens_S": 3},
}


@pytest.mark.parametrize("name", CASES)
def test_accepted_tokens_have_the_models_distribution(name):
    """Two tokens behind a drafted one, of 100,000 requests that differ in their seeds alone: those that were accepted, those that
    stand in for a draft and those behind an accepted one, all together, against the distribution worked out by hand."""
    first, draft = 0, int(jnp.argmax(Head().table[0]))
    state = DeviceState.zeros(1, V)
    state = dataclasses.replace(
        state,
        seen=state.seen.at[0].set(jnp.arange(V, dtype=jnp.int16) % 3),
        bias_ids=state.bias_ids.at[0, :2].set(jnp.array([2, 5])),
        bias_values=state.bias_values.at[0, :2].set(jnp.array([1.0, -0.7])),
        banned_ids=state.banned_ids.at[0, :2].set(jnp.array([(draft + 1) % V, (draft + 5) % V])),
    )
    rows, place = 2 * DRAWS, np.tile([0, 1], DRAWS)
    given = fields(rows, True, place_S=place, draft_S=np.where(place == 0, draft, -1), **CASES[name])
    given["seed_S"][:] = np.repeat(seeds(DRAWS), 2, axis=0)
    given["length_S"][:], given["prompt_len_S"][:] = 3 + place, 1
    hidden = jax.nn.one_hot(np.where(place == 0, first, draft), V)
    mask = jnp.zeros((rows, 1), jnp.int32)
    _, out = program(K, "xla")(given, state, hidden, mask)
    tokens = np.asarray(out.tokens_finite[0]).reshape(-1, 2)
    assert ((tokens[:, 0] == draft) == (tokens[:, 1] >= 0)).all()
    _check(tokens[:, 0], _distribution(first, state, CASES[name], behind=()))
    _check(tokens[tokens[:, 1] >= 0, 1], _distribution(draft, state, CASES[name], behind=(draft,)))


def _distribution(token: int, state: DeviceState, asked: dict, behind: tuple[int, ...]) -> np.ndarray:
    """What a row may draw from, in float64 from first principles."""
    x = np.asarray(Head().table[token], np.float64)
    counts = np.asarray(state.seen[0], np.int64) + np.bincount(behind, minlength=V)
    repetition = np.where(counts > 0, asked.get("repetition_S", 1.0), 1.0)
    x = np.where(x > 0, x / repetition, x * repetition)
    x = x - asked.get("frequency_S", 0.0) * counts - asked.get("presence_S", 0.0) * (counts > 0)
    if asked.get("biased_S"):
        np.add.at(x, [2, 5], [1.0, -0.7])
    if 2 + len(behind) < asked.get("min_tokens_S", 0):  # two completion tokens before the first that is drawn
        x[np.asarray(state.banned_ids[0, :2])] = -np.inf
    x = x / asked.get("temperature_S", 1.0)
    if k := asked.get("top_k_S"):
        x[x < np.sort(x)[-k]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    p[p < asked.get("min_p_S", 0.0) * p.max()] = 0
    order = np.argsort(-p)
    kept = np.cumsum(p[order]) - p[order] < asked.get("top_p_S", 1.0)
    p[order[~kept]] = 0
    return p / p.sum()


def _check(tokens: np.ndarray, expected: np.ndarray) -> None:
    counts = np.bincount(tokens, minlength=V)
    assert not counts[expected == 0].any()
    likely = expected > 0
    wanted = expected[likely] * len(tokens)
    statistic = ((counts[likely] - wanted) ** 2 / wanted).sum()
    assert chi2.sf(statistic, likely.sum() - 1) > 1e-4


@pytest.mark.parametrize("body", ["xla", sampling.best_body("cpu")])
def test_the_very_tokens_that_are_drawn_without_drafts(body):
    """Rows of up to three drafts, with penalties and without, against one row a step: tokens, last token, length, counts."""
    count, rng = 24, np.random.default_rng(7)
    start = DeviceState.zeros(count, V)
    start = dataclasses.replace(start, last_token=jnp.asarray(rng.integers(0, V, count + 1), jnp.int32))
    asked = {
        "repetition_S": np.where(np.arange(count) % 2, 1.5, 1.0),
        "temperature_S": np.where(np.arange(count) % 3, 0.9, 0.0),
        "slot_S": np.arange(count),
        "prompt_len_S": np.full(count, 1),
        "seed_S": seeds(count),
    }
    state, tokens = start, []
    for _ in range(K + 1):
        f = fields(count, False, **asked, length_S=-1)
        hidden, mask = jax.nn.one_hot(state.last_token[:count], V), jnp.zeros((count, 1), jnp.int32)
        state, out = program(0, body)(f, state, hidden, mask)
        tokens.append(np.asarray(out.tokens_finite[0]))
    plain = np.stack(tokens, axis=1)  # [requests, K + 1]
    wrong = rng.integers(0, K + 2, count)  # the first draft that is wrong
    drafts = np.where(np.arange(K) == wrong[:, None], (plain[:, :K] + 1) % V, plain[:, :K])
    places = np.tile(np.arange(K + 1), count)
    repeated = {name: np.repeat(value, K + 1, axis=0) for name, value in asked.items()}
    f = fields(count * (K + 1), True, **repeated, length_S=-1, place_S=places)
    f["draft_S"][:] = np.pad(drafts, ((0, 0), (0, 1)), constant_values=-1).reshape(-1)
    inputs = np.concatenate([np.asarray(start.last_token)[:count, None], drafts], axis=1).reshape(-1)
    mask = jnp.zeros((count * (K + 1), 1), jnp.int32)
    verified, out = program(K, body)(f, start, jax.nn.one_hot(inputs, V), mask)
    accepted = np.minimum(wrong, K)
    found = np.asarray(out.tokens_finite[0]).reshape(count, K + 1)
    assert found.tolist() == np.where(np.arange(K + 1) <= accepted[:, None], plain, -1).tolist()
    assert verified.length[:count].tolist() == (accepted + 1).tolist()
    assert verified.last_token[:count].tolist() == plain[np.arange(count), accepted].tolist()
    counts = [
        np.bincount(row[: n + 1], minlength=V) if i % 2 else np.zeros(V, int)
        for i, (row, n) in enumerate(zip(plain, accepted, strict=True))
    ]
    assert np.asarray(verified.seen[:count]).tolist() == np.asarray(counts).tolist()
