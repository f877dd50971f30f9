"""Sparse attention behind a lightning indexer (DeepSeek-AI 2025, DeepSeek-V3.2; Z.ai 2026, GLM-5): each query attends to the few
positions that small keys of their own score best.

Such a layer's pages hold one latent for K and V, and in V's place the index key of each position (`KVSpec.indexed`). Layers may
attend to what a layer before them chose: their pages hold the latent alone. Plain XLA on every platform: keys are scored a span at
a time, so cost follows the longest context in the batch, and only the chosen latents are read. While no context is longer than
what is chosen, all positions are, and attention is `attend`'s.

Of positions with equal scores the first ones are chosen (with few heads, many are exactly 0): as torch does on GPUs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ops import paged_attention, per_device
from ops.paged_attention import pages as kv_pages
from ops.paged_attention import xla
from ops.paged_attention.batch import AttentionBatch, KVSpec
from ops.paged_attention.pages import KVPages
from ops.paged_attention.sequences import Sequences

LEAST_SPAN = 512
"""Positions scored at once, at least; as many as are chosen where that is more, so that sorting is half of it old ones."""

ROWS_AT_ONCE = 8
"""Off the CPU, of blocks of queries; a CPU takes them one by one, since each reads its own pages."""

_UNSEEN = -1e30  # finite: its differences are not NaN


def latent_spec(width: int, index_dim: int | None) -> KVSpec:
    """What a layer keeps of each position: a latent of `width` numbers, and where it has an indexer a key of `index_dim`."""
    return KVSpec(1, width, index_dim or 0, indexed=index_dim is not None)


def write(kv: KVPages, latent_Th: jax.Array, index_key_Ti: jax.Array | None, batch: AttentionBatch | Sequences) -> Any:
    """The pages with this step's latents and index keys (None where the layer has no indexer); of Sequences the two themselves."""
    latent_T1h, key_T1i = latent_Th[:, None], None if index_key_Ti is None else index_key_Ti[:, None]
    if isinstance(batch, Sequences):
        return latent_T1h, key_T1i
    return _everywhere(kv_pages.write, kv)(kv, latent_T1h, key_T1i, batch.kv_index_T)


def choose(
    query_THi: jax.Array, weight_TH: jax.Array, kv: Any, batch: AttentionBatch | Sequences, topk: int
) -> jax.Array | None:
    """The positions that each token attends to.

    Args:
        query_THi: H index queries a token, rotated already; any float dtype.
        weight_TH: float32, what each head's score counts, with whatever scales the scores: a position's score is
            sum_H weight relu(query . key), in float32.
        kv: as `write` gave it.
        topk: how many are chosen at most.
    Returns:
        int32 [T, topk], best first, -1 where there are fewer; of Sequences places in their rows. Arbitrary while no context of the
        batch is longer than topk, and None where none can be: all positions are attended to.
    """
    query_THi = query_THi.astype(jnp.float32)
    if isinstance(batch, Sequences):
        return _choose_in_rows(query_THi, weight_TH, kv[1][:, 0], batch, topk)
    if _capacity(batch, kv) <= topk:
        return None

    def chosen(query_THi: jax.Array, weight_TH: jax.Array, kv: KVPages, batch: AttentionBatch) -> jax.Array:
        def block(query_MHi: jax.Array, weight_MH: jax.Array, position_M: jax.Array, pages_P: jax.Array) -> jax.Array:
            return _choose_block(query_MHi, weight_MH, position_M, pages_P, kv, topk)

        return jax.lax.cond(
            _longest(batch) > topk,
            lambda: _by_blocks(block, batch, kv, query_THi, weight_TH),
            lambda: jnp.zeros((batch.num_tokens, topk), jnp.int32),
        )

    return _everywhere(chosen, kv)(query_THi, weight_TH, kv, batch)


def attend_chosen(
    q_TGh: jax.Array, kv: Any, batch: AttentionBatch | Sequences, chosen_TX: jax.Array | None, *, scale: float
) -> jax.Array:
    """Attention of G heads to the chosen positions' latents, which are keys and values: out_TGh in q's dtype.

    Args:
        kv: as `write` gave it: this layer's, not those of the layer that chose.
        chosen_TX: as `choose` gave it.
        scale: multiplies q . latent.
    """
    if isinstance(batch, Sequences):
        return _attend_in_rows(q_TGh, kv[0][:, 0], batch, chosen_TX, scale)
    latents = dataclasses.replace(
        kv, v=None, v_scale=None, spec=dataclasses.replace(kv.spec, v_head_dim=0, indexed=False)
    )

    def dense(q_TGh: jax.Array, kv: KVPages, batch: AttentionBatch) -> jax.Array:
        options: dict[str, Any] = {"scale": scale, "window": None, "softcap": None, "sinks_KG": None}
        return xla.attend(q_TGh[:, None], None, None, kv, batch, **options)[0][:, 0]

    if (
        chosen_TX is None and kv.layout != "lanes"
    ):  # whose rows have room for index keys, and kernels count on the latent's alone
        return paged_attention.attend(q_TGh[:, None], None, None, latents, batch, scale=scale)[0][:, 0]
    if chosen_TX is None:
        return _everywhere(dense, kv)(q_TGh, latents, batch)

    def attended(q_TGh: jax.Array, chosen_TX: jax.Array, kv: KVPages, batch: AttentionBatch) -> jax.Array:
        def block(q_MGh: jax.Array, chosen_MX: jax.Array, _: jax.Array, pages_P: jax.Array) -> jax.Array:
            return _attend_block(q_MGh, chosen_MX, pages_P, kv, scale)

        return jax.lax.cond(
            _longest(batch) > chosen_TX.shape[1],
            lambda: _by_blocks(block, batch, kv, q_TGh, chosen_TX).astype(q_TGh.dtype),
            lambda: dense(q_TGh, kv, batch),
        )

    return _everywhere(attended, kv)(q_TGh, chosen_TX, latents, batch)


def _everywhere(function: Callable[..., Any], kv: KVPages) -> Callable[..., Any]:
    """Each device does all of it: pages of one head are not cut, and no collective may stand in a branch."""
    if kv.mesh is None:
        return function
    return per_device.per_device(function, kv.mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())


def _capacity(batch: AttentionBatch, kv: KVPages) -> int:
    """The longest context that page tables have room for, static."""
    widths = [batch.decode_pages_BP.shape[1]] if batch.num_decode else []
    widths += [batch.chunk_pages_RP.shape[1]] if batch.num_chunk else []
    return max(widths) * kv.page_size


def _longest(batch: AttentionBatch) -> jax.Array:
    longest = jnp.zeros((), jnp.int32)
    if batch.num_decode:
        longest = jnp.maximum(longest, batch.decode_len_B.max())
    return jnp.maximum(longest, batch.chunk_len_R.max()) if batch.num_chunk else longest


def _by_blocks(
    function: Callable[..., jax.Array], batch: AttentionBatch, kv: KVPages, *by_token: jax.Array
) -> jax.Array:
    """What a function makes of M queries that share a page table: it is given their part of each of `by_token`, their positions (-1
    for padding) and the table. All tokens' results."""
    first, parts = batch.num_decode_tokens, []
    if batch.num_decode:
        parts.append((slice(0, first), batch.row_positions(), batch.decode_pages_BP))
    if batch.num_chunk:
        pages_NP, position_NQ = xla.chunk_blocks(batch)
        parts.append((slice(first, None), position_NQ, pages_NP))
    made = []
    for tokens, position_XM, pages_XP in parts:
        X, M = position_XM.shape
        own = tuple(x[tokens].reshape(X, M, *x.shape[1:]) for x in by_token)
        at_once = None if kv.platform == "cpu" else min(X, ROWS_AT_ONCE)
        out_XM = jax.lax.map(lambda one: function(*one), (*own, position_XM, pages_XP), batch_size=at_once)
        made.append(out_XM.reshape(X * M, *out_XM.shape[2:]))
    return made[0] if len(made) == 1 else jnp.concatenate(made)


def _scores(query_MHi: jax.Array, weight_MH: jax.Array, key_Si: jax.Array) -> jax.Array:
    """The index scores, [M, S] float32."""
    highest: Any = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    each_MHS = jax.nn.relu(jnp.einsum("mhi,si->mhs", query_MHi, key_Si, **highest))
    score_MS = jnp.einsum("mh,mhs->ms", weight_MH, each_MHS, **highest)
    return jnp.where(score_MS == 0.0, 0.0, score_MS)  # -0 would come behind 0


def _choose_block(
    query_MHi: jax.Array, weight_MH: jax.Array, position_M: jax.Array, pages_P: jax.Array, kv: KVPages, topk: int
) -> jax.Array:
    """The best of each span are put behind the best so far, which are of earlier positions, and sorted with them: of equal ones
    the first stay first."""
    M = position_M.shape[0]
    per_span = -(-max(topk, LEAST_SPAN) // kv.page_size)
    S = per_span * kv.page_size
    pages_P = jnp.pad(pages_P, (0, -pages_P.shape[0] % per_span))

    def fold(span: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        pages_g = jax.lax.dynamic_slice_in_dim(pages_P, span * per_span, per_span)
        key_Si = kv_pages.read(kv, pages_g, jnp.float32)[1].reshape(S, -1)
        position_S = span * S + jnp.arange(S, dtype=jnp.int32)
        score_MS = jnp.where(
            position_S <= position_M[:, None], _scores(query_MHi, weight_MH, key_Si), -jnp.inf
        )  # what lies behind may be anything, NaN too
        places = jnp.concatenate([best[1], jnp.broadcast_to(position_S, (M, S))], axis=1)
        score_MX, at_MX = jax.lax.top_k(jnp.concatenate([best[0], score_MS], axis=1), topk)
        return score_MX, jnp.take_along_axis(places, at_MX, axis=1)

    nothing = jnp.full((M, topk), -jnp.inf, jnp.float32), jnp.full((M, topk), -1, jnp.int32)
    score_MX, chosen_MX = jax.lax.fori_loop(0, position_M.max() // S + 1, fold, nothing)
    return jnp.where(score_MX > -jnp.inf, chosen_MX, -1)


def _attend_block(q_MGh: jax.Array, chosen_MX: jax.Array, pages_P: jax.Array, kv: KVPages, scale: float) -> jax.Array:
    """float32. A query without positions yields zeros."""
    size = kv.page_size
    narrow = q_MGh.dtype == kv.k.dtype and kv.platform != "cpu"
    seen_MX, place_MX = chosen_MX >= 0, jnp.maximum(chosen_MX, 0)
    index_MX = pages_P[place_MX // size] * size + place_MX % size
    latent_MXh = kv_pages.read_tokens(kv, index_MX, kv.k.dtype if narrow else jnp.float32)[:, :, 0]
    latent_MXh = jnp.where(seen_MX[..., None], latent_MXh, jnp.zeros((), latent_MXh.dtype))
    return _softmaxed(q_MGh, latent_MXh, seen_MX, scale)


def _softmaxed(q_MGh: jax.Array, latent_MXh: jax.Array, seen_MX: jax.Array, scale: float) -> jax.Array:
    dtype = latent_MXh.dtype
    options: dict[str, Any] = {"preferred_element_type": jnp.float32}
    options |= {"precision": jax.lax.Precision.HIGHEST} if dtype == jnp.float32 else {}
    q_MGh = (q_MGh.astype(jnp.float32) * scale).astype(dtype)
    score_MGX = jnp.einsum("mgh,mxh->mgx", q_MGh, latent_MXh, **options)
    score_MGX = jnp.where(seen_MX[:, None], score_MGX, _UNSEEN)
    weight_MGX = jnp.where(seen_MX[:, None], jnp.exp(score_MGX - score_MGX.max(axis=-1, keepdims=True)), 0.0)
    total_MG = weight_MGX.sum(axis=-1)
    out_MGh = jnp.einsum("mgx,mxh->mgh", weight_MGX.astype(dtype), latent_MXh, **options)
    return out_MGh / jnp.where(total_MG == 0.0, 1.0, total_MG)[..., None]


def _seen_in_rows(batch: Sequences) -> jax.Array:
    """[B, S, S]: a token's own text up to itself."""
    segment_BS = batch.segments_BS
    before_SS = jnp.tril(jnp.ones((segment_BS.shape[1],) * 2, bool))
    return before_SS & (segment_BS[:, :, None] == segment_BS[:, None])


def _choose_in_rows(
    query_THi: jax.Array, weight_TH: jax.Array, key_Ti: jax.Array, batch: Sequences, topk: int
) -> jax.Array | None:
    """No gradient flows through what is chosen."""
    B, S = batch.segments_BS.shape
    if topk >= S:
        return None
    score_BSS = jax.vmap(_scores)(
        *(x.astype(jnp.float32).reshape(B, S, *x.shape[1:]) for x in (query_THi, weight_TH, key_Ti))
    )
    score_BSX, chosen_BSX = jax.lax.top_k(jnp.where(_seen_in_rows(batch), score_BSS, -jnp.inf), topk)
    return jax.lax.stop_gradient(jnp.where(score_BSX > -jnp.inf, chosen_BSX, -1).reshape(B * S, topk))


def _attend_in_rows(
    q_TGh: jax.Array, latent_Th: jax.Array, batch: Sequences, chosen_TX: jax.Array | None, scale: float
) -> jax.Array:
    if chosen_TX is None:
        kept: Any = (latent_Th[:, None], None)
        return paged_attention.attend(q_TGh[:, None], None, None, kept, batch, scale=scale)[0][:, 0]
    B, S = batch.segments_BS.shape
    chosen_BSX = chosen_TX.reshape(B, S, -1)
    token, row = jnp.arange(S)[:, None], jnp.arange(B)[:, None, None]
    seen_BSS = jnp.zeros((B, S, S + 1), bool).at[row, token, jnp.where(chosen_BSX < 0, S, chosen_BSX)].set(True)
    latent_BSh = latent_Th.reshape(B, S, -1)

    def one(q_SGh: jax.Array, latent_Sh: jax.Array, seen_SS: jax.Array) -> jax.Array:
        return _softmaxed(q_SGh, jnp.broadcast_to(latent_Sh, (S, *latent_Sh.shape)), seen_SS, scale)

    out_BSGh = jax.vmap(one)(q_TGh.reshape(B, S, *q_TGh.shape[1:]), latent_BSh, seen_BSS[:, :, :S])
    return out_BSGh.reshape(q_TGh.shape[0], *out_BSGh.shape[2:]).astype(q_TGh.dtype)
