"""What is learned: the next token of texts, or which texts belong together. Sums over a batch, and what they are sums of."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp

from models.api import Step
from models.pooling import pool
from ops.paged_attention import Sequences

LOGIT_ROWS = 512
"""Targets whose logits are there at once; more are computed in turns, and again in the backward pass."""


def hidden_states(
    model: Any, tokens_BS: jax.Array, segments_BS: jax.Array, positions_BS: jax.Array, single: bool
) -> jax.Array:
    """A decoder's hidden_TD of B rows of texts, T = B S; see `Sequences`."""
    attention = Sequences(segments_BS, positions_BS, single)
    step = Step(tokens_BS.reshape(-1), positions_BS.reshape(-1), cast(Any, attention))
    return model.forward(step, (None,) * len(model.kv_specs())).hidden_TD


def next_tokens(model: Any, batch: tuple[jax.Array, ...], single: bool) -> tuple[jax.Array, jax.Array]:
    """(sum of -log p(target), how many targets are the likeliest token) over a batch of `Rows`; both float32.

    Logits are computed where there is a target and nowhere else: of a chat that is a fraction of its tokens, and the vocabulary
    is the widest product of a small model.
    """
    tokens_BS, segments_BS, positions_BS, index_BM, target_BM, weight_BM = batch
    (B, S), M = tokens_BS.shape, index_BM.shape[1]
    hidden_TD = hidden_states(model, tokens_BS, segments_BS, positions_BS, single)
    hidden_BMD = jnp.take_along_axis(hidden_TD.reshape(B, S, -1), index_BM[..., None], axis=1)

    def part(hidden_BmD: jax.Array, target_Bm: jax.Array, weight_Bm: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_RV = model.logits(hidden_BmD.reshape(-1, hidden_BmD.shape[-1]))
        target_R, weight_R = target_Bm.reshape(-1), weight_Bm.reshape(-1)
        own_R = jnp.take_along_axis(logits_RV, target_R[:, None], axis=-1)[:, 0]
        loss_R = jax.nn.logsumexp(logits_RV, axis=-1) - own_R
        likeliest_R = jax.lax.stop_gradient(logits_RV.max(axis=-1) <= own_R)
        return (loss_R * weight_R).sum(), (likeliest_R * weight_R).sum()

    m = max(1, min(M, LOGIT_ROWS // B))
    if m == M:
        return part(hidden_BMD, target_BM, weight_BM)
    loss = right = jnp.zeros((), jnp.float32)
    for begin in range(0, M, m):
        here = slice(begin, begin + m)
        loss_, right_ = jax.checkpoint(part)(hidden_BMD[:, here], target_BM[:, here], weight_BM[:, here])
        loss, right = loss + loss_, right + right_
    return loss, right


def pairs(
    model: Any, batch: tuple[jax.Array, ...], modes: tuple[str, ...], temperature: float
) -> tuple[jax.Array, jax.Array]:
    """(sum over queries of -log p(its positive), how many find it first): InfoNCE (van den Oord et al. 2018, arXiv:1807.03748)
    over cosines, against every positive and negative of the batch.

    Args:
        batch: tokens_BkS and length_Bk of `PairRows`.
        modes: of pooling, as `EmbeddingHead.modes`.
        temperature: cosines are divided by it.
    """
    tokens_BkS, length_Bk = batch
    B, k, S = tokens_BkS.shape
    tokens_NS, length_N = tokens_BkS.swapaxes(0, 1).reshape(k * B, S), length_Bk.T.reshape(-1)
    if hasattr(model, "encode"):
        hidden_NSD = model.encode(tokens_NS, length_N)
    else:
        positions_NS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), tokens_NS.shape)
        hidden_NSD = hidden_states(model, tokens_NS, jnp.zeros_like(tokens_NS), positions_NS, True).reshape(
            k * B, S, -1
        )
    vectors = jnp.concatenate([pool(hidden_NSD, length_N, mode, normalize=False) for mode in modes], axis=-1)
    vectors = vectors * jax.lax.rsqrt(jnp.maximum((vectors * vectors).sum(-1, keepdims=True), 1e-24))
    query_BD, other_CD = vectors[:B], vectors[B:]
    cosine_BC = jnp.einsum("bd,cd->bc", query_BD, other_CD, precision=jax.lax.Precision.HIGHEST)
    score_BC = jnp.where(length_N[B:] > 0, cosine_BC / temperature, -jnp.inf)
    there_B = length_N[:B] > 0
    own_B = jnp.where(there_B, jnp.diagonal(score_BC[:, :B]), 0.0)
    total_B = jax.nn.logsumexp(jnp.where(there_B[:, None], score_BC, 0.0), axis=-1)
    right_B = (score_BC.max(axis=-1) <= own_B) & there_B
    return jnp.where(there_B, total_B - own_B, 0.0).sum(), right_B.sum().astype(jnp.float32)
