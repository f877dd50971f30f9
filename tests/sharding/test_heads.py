"""Attention on meshes that do not divide its heads computes what it does on one device."""

import numpy as np
import pytest

from models.layers.heads import PlacedHeads, Spread


def attend(q_KGh, k_Kh, v_Kh, keys_SKh, values_SKh):
    scores = np.einsum("kgh,skh->kgs", q_KGh, keys_SKh)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("kgs,skh->kgh", weights / weights.sum(-1, keepdims=True), values_SKh)


@pytest.mark.parametrize(
    "K,G,shards,placed",
    [
        (3, 3, 2, (4, 3)),
        (3, 3, 4, (4, 3)),
        (8, 8, 16, (16, 4)),
        (4, 16, 16, (16, 4)),
        (2, 3, 8, (8, 1)),
        (8, 4, 4, (8, 4)),
    ],
)
def test_spread_heads_compute_the_same(K, G, shards, placed):
    h, D, rng = 4, 10, np.random.default_rng(0)
    heads = PlacedHeads(K, G, h, shards)
    assert (heads.kv_heads, heads.group) == placed and heads.kv_heads % shards == 0
    qkv, out = rng.standard_normal((K * (G + 2) * h, D)), rng.standard_normal((D, K * G * h))
    x_TD = rng.standard_normal((5, D))

    def block(qkv, out, K, G):
        qkv_TKgh = (x_TD @ qkv.T).reshape(5, K, G + 2, h)
        k, v = qkv_TKgh[:, :, G], qkv_TKgh[:, :, G + 1]
        return attend(qkv_TKgh[-1, :, :G], k[-1], v[-1], k, v).reshape(-1) @ out.T

    spread_qkv, spread_out = Spread(heads, "qkv"), Spread(heads, "out")
    moved_qkv, moved_out = spread_qkv.apply(qkv), spread_out.apply(out)
    np.testing.assert_allclose(block(moved_qkv, moved_out, *placed), block(qkv, out, K, G), rtol=1e-10)
    assert spread_qkv.stored_shape(moved_qkv.shape) == qkv.shape
    assert spread_out.stored_shape(moved_out.shape) == out.shape


def test_sinks_go_with_their_query_heads():
    heads = PlacedHeads(K=2, G=3, h=4, shards=4)
    sinks = Spread(heads, "sinks").apply(np.arange(1.0, 7.0))
    assert sinks.tolist() == [[1, 2], [3, 0], [4, 5], [6, 0]]
