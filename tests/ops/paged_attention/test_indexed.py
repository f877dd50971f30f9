"""Attention to what an indexer chooses, against numpy: one query after the other, positions sorted by score."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.paged_attention import Sequences, indexed, pages, reference
from ops.paged_attention.cases import Case, make_arguments

H, INDEX, LATENT = 4, 8, 24
CASE = Case(
    decode=(1500, 0, 7, 40), queries=(2, 0, 1, 3), chunks=((0, 18), (600, 20), (0, 0)), pad_blocks=1,
    num_kv_heads=1, group=3, head_dim=LATENT, v_head_dim=INDEX,
)  # fmt: skip


def by_hand(q_Gh, query_Hi, weight_H, latent_Sh, key_Si, topk):
    """(the chosen positions, best first; what is attended)."""
    score_S = weight_H @ np.maximum(query_Hi @ key_Si.T, 0.0)
    chosen = np.lexsort((np.arange(len(score_S)), -score_S))[:topk]
    weight_GX = np.exp(q_Gh @ latent_Sh[chosen].T)
    return chosen, weight_GX / weight_GX.sum(1, keepdims=True) @ latent_Sh[chosen]


@pytest.mark.parametrize(
    ("dtype", "layout", "topk"),
    [
        ("float32", "rows", 9),
        pytest.param("int8", "lanes", 24, marks=pytest.mark.slow),
        pytest.param("float32", "rows", 4096, marks=pytest.mark.slow),  # everything: models do that in other tests
    ],
)
def test_the_best_positions_are_attended_to(dtype, layout, topk):
    arguments = make_arguments(CASE)
    spec = indexed.latent_spec(LATENT, INDEX)
    kv = pages.allocate(spec, len(arguments.history_k), CASE.page_size, dtype, None, layout)
    rng, T = np.random.default_rng(1), len(arguments.q_TKGh)
    query_THi, weight_TH = rng.normal(size=(T, H, INDEX)), rng.normal(size=(T, H))
    weight_TH[::3] = 0.0  # all scores are 0: the first positions are chosen
    query_THi[1::7] = -query_THi[1::7]

    @jax.jit
    def step(q_TGh, query_THi, weight_TH, kv, batch):
        kv = indexed.write(kv, arguments.k_TKh[:, 0], arguments.v_TKh[:, 0], batch)
        chosen_TX = indexed.choose(query_THi, weight_TH, kv, batch, topk)
        return chosen_TX, indexed.attend_chosen(q_TGh, kv, batch, chosen_TX, scale=1.0), kv

    history = arguments.history_k, arguments.history_v
    k, v = (x.reshape(-1, 1, x.shape[-1]) for x in history)
    kv = pages.write(kv, k, v, jnp.arange(len(k), dtype=jnp.int32))
    q_TGh = arguments.q_TKGh[:, 0]
    chosen_TX, out_TGh, kv = step(
        q_TGh, query_THi.astype(np.float32), weight_TH.astype(np.float32), kv, arguments.batch
    )
    latents, keys = (np.asarray(x)[:, 0] for x in pages.read(kv, np.arange(kv.num_pages), jnp.float32))
    real = np.zeros(T, bool)
    for token, table, position in reference._queries(arguments.batch):
        at = np.arange(position + 1)
        where = table[at // CASE.page_size], at % CASE.page_size
        chosen, out_Gh = by_hand(q_TGh[token], query_THi[token], weight_TH[token], latents[where], keys[where], topk)
        np.testing.assert_allclose(out_TGh[token], out_Gh, rtol=2e-4, atol=2e-4)
        if topk < 1500:
            np.testing.assert_array_equal(chosen_TX[token][: len(chosen)], chosen)
            assert (np.asarray(chosen_TX[token][len(chosen) :]) == -1).all()
        real[token] = True
    assert (chosen_TX is None) == (topk == 4096)
    assert not np.asarray(out_TGh)[~real].any()


def test_whole_sequences_choose_within_their_own_texts():
    """Two texts in one row, padding behind them."""
    rng, S, topk = np.random.default_rng(2), 24, 5
    segments_S = np.array([1] * 9 + [2] * 12 + [0] * 3)
    batch = Sequences(jnp.asarray(segments_S[None]), jnp.zeros((1, S), jnp.int32))
    q_TGh, query_THi = rng.normal(size=(S, 2, LATENT)), rng.normal(size=(S, H, INDEX))
    weight_TH, latent, key = rng.normal(size=(S, H)), rng.normal(size=(S, LATENT)), rng.normal(size=(S, INDEX))
    q_TGh, query_THi, weight_TH, latent, key = (
        x.astype(np.float32) for x in (q_TGh, query_THi, weight_TH, latent, key)
    )

    @jax.jit
    def whole(q_TGh, query_THi, weight_TH, latent, key):
        kept = indexed.write(None, latent, key, batch)
        chosen_TX = indexed.choose(query_THi, weight_TH, kept, batch, topk)
        return indexed.attend_chosen(q_TGh, kept, batch, chosen_TX, scale=1.0)

    out_TGh = np.asarray(whole(q_TGh, query_THi, weight_TH, latent, key))
    for token in range(21):
        own = np.flatnonzero((segments_S == segments_S[token]) & (np.arange(S) <= token))
        _, out_Gh = by_hand(q_TGh[token], query_THi[token], weight_TH[token], latent[own], key[own], topk)
        np.testing.assert_allclose(out_TGh[token], out_Gh, rtol=1e-4, atol=1e-4)


def test_native_kernels_are_not_asked_for_such_pages():
    spec = dataclasses.replace(indexed.latent_spec(64, 64), indexed=False)
    assert indexed.latent_spec(64, None).v_head_dim == 0
    from ops.paged_attention import best_layout

    assert best_layout(dataclasses.replace(spec, indexed=True), 16, "float32", "cpu") == "rows"
