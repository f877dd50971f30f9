"""The contract of a step: decode rows of several places, embeddings from elsewhere, taps; and what is absent unless asked."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.api import Embeddings, Step
from models.config import ModelConfig, RopeConfig
from models.dummy import random_model
from ops.paged_attention import Q_BLOCK, AttentionBatch, allocate

LAYERS, PAGE, PAGES = 3, 16, 3
TOKENS = np.array([3, 60, 7, 7, 12, 40, 33, 1, 2, 59, 21, 5], np.int32)


@pytest.fixture(scope="module")
def run():
    """run(steps...) -> the results of steps one after the other over fresh pages."""
    rope = RopeConfig(1e4, 8)
    config = ModelConfig("Qwen3ForCausalLM", 64, LAYERS, 32, 48, 4, 2, 8, 64, 1e-6, rope=rope, qk_norm="head")
    model = random_model(config)
    graphdef, state = nnx.split(model)

    @jax.jit
    def forward(state, step, kv):
        merged = nnx.merge(graphdef, state)
        result = merged.forward(step, kv)
        return result, [merged.norm(tap) for tap in result.taps], merged.embed.weight.get_value()

    def run(*steps):
        kv = tuple(allocate(spec, 1 + PAGES, PAGE, jnp.float32) for spec in model.kv_specs())
        out = None
        for step in steps:
            out = forward(state, step, kv)
            kv = out[0].cache
        return out

    return run


def prompt(tokens: np.ndarray) -> Step:
    """The first tokens of a sequence, as a chunk."""
    position = np.arange(Q_BLOCK, dtype=np.int32)
    real = position < len(tokens)
    length = np.array([len(tokens)], np.int32)
    batch = AttentionBatch(
        np.where(real, position + PAGE, 0),
        np.zeros((0, PAGES), np.int32),
        np.zeros(0, np.int32),
        np.array([[1, 2, 3]], np.int32),
        np.zeros(1, np.int32),
        length,
        length,
        np.zeros(1, np.int32),
    )
    return Step(np.pad(tokens, (0, Q_BLOCK - len(tokens))), np.where(real, position, 0), batch)


def row(tokens: np.ndarray, first: int, places: int) -> Step:
    """A padded decode row, and one with the tokens from position `first` on, of so many places."""
    n = len(tokens)
    none = np.zeros(0, np.int32)
    place = np.arange(places)
    position = np.where(place < n, first + place, 0).astype(np.int32)
    pad = np.zeros(places, np.int32)
    batch = AttentionBatch(
        np.concatenate([pad, np.where(place < n, position + PAGE, 0)]).astype(np.int32),
        np.array([[0, 0, 0], [1, 2, 3]], np.int32),
        np.array([0, first + n], np.int32),
        np.zeros((0, PAGES), np.int32),
        none,
        none,
        none,
        none,
        decode_qlen_B=np.array([0, n], np.int32),
    )
    return Step(np.concatenate([pad, np.pad(tokens, (0, places - n))]), np.concatenate([pad, position]), batch)


def test_a_row_of_several_places_is_what_a_chunk_is(run):
    whole = run(prompt(TOKENS))[0].hidden_TD[: len(TOKENS)]
    # Four tokens, of which the last two are drafts that turn out wrong: what they wrote is written over.
    wrong = np.array([*TOKENS[5:7], 8, 8], np.int32)
    rows = run(prompt(TOKENS[:5]), row(wrong, 5, 4), row(TOKENS[7:10], 7, 4))[0].hidden_TD
    np.testing.assert_allclose(rows[4:7], whole[7:10], atol=1e-5)


def test_embeddings_from_elsewhere(run):
    plain, _, table_VD = run(prompt(TOKENS))
    index_T = np.full(Q_BLOCK, -1, np.int32)
    index_T[[2, 3]] = 1, 0
    step = dataclasses.replace(prompt(TOKENS), embeddings=Embeddings(np.asarray(table_VD)[[9, 7]], index_T))
    other = TOKENS.copy()
    other[3] = 9
    hidden = run(step)[0].hidden_TD  # token 2 has its own embedding again, and 3 that of token 9
    np.testing.assert_array_equal(hidden[: len(TOKENS)], run(prompt(other))[0].hidden_TD[: len(TOKENS)])
    assert np.abs(hidden - plain.hidden_TD).max() > 0.01


def test_taps_are_what_enters_the_layers(run):
    step = dataclasses.replace(prompt(TOKENS), taps=(LAYERS, 0, 2))
    result, normed, table_VD = run(step)
    np.testing.assert_array_equal(normed[0], result.hidden_TD)
    embedded_TD = np.asarray(table_VD)[np.asarray(step.tokens_T)]
    embedded_TD[len(TOKENS) :] = 0  # padding
    np.testing.assert_array_equal(result.taps[1], embedded_TD)
    assert [tap.shape for tap in result.taps] == [result.hidden_TD.shape] * 3
    plain = run(prompt(TOKENS))[0]
    np.testing.assert_array_equal(plain.hidden_TD, result.hidden_TD)
    assert plain.taps == plain.visited == ()


def test_what_is_not_used_is_absent():
    step = prompt(TOKENS)
    assert len(jax.tree.leaves(step)) == 2 + 8  # tokens, positions, and the batch of one place a row
    assert step.attention.queries == 1
