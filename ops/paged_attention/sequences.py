"""Attention of whole sequences, without pages: what training computes, in operations that differentiate.

A model is given `Sequences` where a step of the engine has an `AttentionBatch`, and no pages. Queries go in blocks, each against
the keys that it can see at all: nearly half of the scores are never computed, with a window most of them. The backward pass is
written out: left to itself it goes through the scores twice as often. Of long rows it computes a block's scores again, so that no
more than one block's are in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ops.rope import cos_sin

MAX_BLOCKS = 8
"""Blocks of queries of a sequence at most: each is traced and compiled."""

MIN_BLOCK = 64
"""Measured on two cores, 9 heads of 64 over 256 tokens, forward and backward: 6.7 ms; 9.9 in blocks of 128, 11.9 in one."""

KEPT_SCORES = 1 << 26
"""Scores of a layer (256 MiB) that are kept for the backward pass; where there are more it computes each block's again."""

_UNSEEN = -1e30  # finite: its differences are not NaN


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["segments_BS", "positions_BS"], meta_fields=["single"]
)
@dataclasses.dataclass(frozen=True)
class Sequences:
    """B rows of S tokens, T = B S: every token sees those of its own segment up to itself.

    Attributes:
        segments_BS: int32, which text of its row a token is of; neighbours of one segment are one text. Padding is a segment too,
            0 by custom.
        positions_BS: int32, the token's position in its text.
        single: static: each row is one text, and what is behind it padding: nothing is masked but what is to come.
    """

    segments_BS: jax.Array
    positions_BS: jax.Array
    single: bool = False

    def by_group(self) -> tuple[Sequences, ...]:
        """As `AttentionBatch.by_group`: where nothing is kept there is one group."""
        return (self,)

    def real(self) -> None:
        """As `AttentionBatch.real`: padding is a segment like others."""
        return None

    def place(self, layer: int) -> tuple[int, int, int]:
        """As `AttentionBatch.place`."""
        return 0, layer, 0


def attend(
    q_TKGh: jax.Array,
    k_TKh: jax.Array,
    v_TKh: jax.Array | None,
    batch: Sequences,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_KG: jax.Array | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """As `ops.paged_attention.attend` on tokens that are all there: out_TKGh in q's dtype."""
    (B, S), (T, K, G, h) = batch.segments_BS.shape, q_TKGh.shape
    assert T == B * S, f"{T} tokens of {B} rows of {S}"
    # Heads first: each product of the blocks is then of whole matrices, and nothing is turned in between.
    q_BKGSh = q_TKGh.reshape(B, S, K, G, h).transpose(0, 2, 3, 1, 4)
    k_BKSh = k_TKh.reshape(B, S, K, h).swapaxes(1, 2)
    v_BKSh = k_BKSh if v_TKh is None else v_TKh.reshape(B, S, K, -1).swapaxes(1, 2)
    size = max(MIN_BLOCK, -(-math.ceil(S / MAX_BLOCKS) // 16) * 16)
    keeps = B * K * G * S * S <= KEPT_SCORES
    queries = tuple((first, min(S, first + size)) for first in range(0, S, size))
    keys = tuple((0 if window is None else max(0, first - window + 1), last) for first, last in queries)
    parts: list[Any] = [
        _block(q, k, v, sinks_KG, _seen(batch, slice(*mine), slice(*theirs), window, chunk), scale, softcap, keeps)
        for q, k, v, mine, theirs in zip(
            lax.split(q_BKGSh, [last - first for first, last in queries], axis=3), _stretches(k_BKSh, keys),
            _stretches(v_BKSh, keys), queries, keys, strict=True,
        )
    ]  # fmt: skip
    out_BKGSh = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=3)
    return out_BKGSh.transpose(0, 3, 1, 2, 4).reshape(T, K, G, -1).astype(q_TKGh.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _stretches(x_BKSh: jax.Array, ranges: tuple[tuple[int, int], ...]) -> tuple[jax.Array, ...]:
    """The keys of each block. Their gradients are added up stretch by stretch: as slices each would be padded to S first."""
    return tuple(x_BKSh[:, :, begin:end] for begin, end in ranges)


def _stretches_forward(x_BKSh: jax.Array, ranges: Any) -> tuple[tuple[jax.Array, ...], None]:
    return tuple(x_BKSh[:, :, begin:end] for begin, end in ranges), None


def _stretches_backward(ranges: Any, _: None, given: tuple[jax.Array, ...]) -> tuple[jax.Array]:
    cuts, parts = sorted({cut for both in ranges for cut in both}), []
    for first, last in itertools.pairwise(cuts):
        own = [
            part[:, :, first - begin : last - begin]
            for part, (begin, end) in zip(given, ranges, strict=True)
            if begin <= first and last <= end
        ]
        parts.append(sum(own[1:], own[0]))
    return (jnp.concatenate(parts, axis=2),)


_stretches.defvjp(_stretches_forward, _stretches_backward)


def split_rotated(
    qkv_TKgh: jax.Array, positions_T: jax.Array, rotary: tuple[np.ndarray, float] | None, longest: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q_TKGh, k_TKh and v_TKh of a fused projection, q and k rotated; see `ops.paged_attention.attend_rope`.

    Cosines and sines come from a table: XLA:CPU would compute them for every head and channel anew. The gradient is written out, as
    halves and heads side by side: left to itself it is a sum of padded arrays.

    Args:
        longest: positions are below it.
    """
    if rotary is None:
        q_TKGh, k_TK1h, v_TK1h = lax.split(qkv_TKgh, (qkv_TKgh.shape[2] - 2, 1, 1), axis=2)
        return q_TKGh, k_TK1h[:, :, 0], v_TK1h[:, :, 0]
    with jax.ensure_compile_time_eval():
        tables = [np.asarray(table) for table in cos_sin(jnp.arange(longest), *rotary)]
    cos_Th2, sin_Th2 = (jnp.take(jnp.asarray(table), positions_T, axis=0, mode="clip") for table in tables)
    return _split_rotated(qkv_TKgh, cos_Th2, sin_Th2)


@jax.custom_vjp
def _split_rotated(
    qkv_TKgh: jax.Array, cos_Th2: jax.Array, sin_Th2: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q_TKGh, k_TKh = (_turned(x, cos_Th2, sin_Th2) for x in (qkv_TKgh[:, :, :-2], qkv_TKgh[:, :, -2]))
    return q_TKGh, k_TKh, qkv_TKgh[:, :, -1]


def _split_rotated_forward(
    qkv_TKgh: jax.Array, cos_Th2: jax.Array, sin_Th2: jax.Array
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    return _split_rotated(qkv_TKgh, cos_Th2, sin_Th2), (cos_Th2, sin_Th2)


def _split_rotated_backward(
    kept: tuple[jax.Array, jax.Array], given: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, None, None]:
    cos_Th2, sin_Th2 = kept
    dq_TKGh, dk_TKh, dv_TKh = given
    dq_TKGh, dk_TKh = (_turned(x, cos_Th2, -sin_Th2) for x in (dq_TKGh, dk_TKh))
    return jnp.concatenate([dq_TKGh, dk_TKh[:, :, None], dv_TKh[:, :, None]], axis=2), None, None


_split_rotated.defvjp(_split_rotated_forward, _split_rotated_backward)


def _turned(x: jax.Array, cos_Th2: jax.Array, sin_Th2: jax.Array) -> jax.Array:
    """As `ops.rope.rope`, of channels that are paired in halves."""
    half = cos_Th2.shape[-1]
    cos, sin = (y.reshape(y.shape[0], *(1,) * (x.ndim - 2), half) for y in (cos_Th2, sin_Th2))
    first, second, rest = lax.split(x, (half, half, x.shape[-1] - 2 * half), axis=x.ndim - 1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([part.astype(x.dtype) for part in turned] + [rest], axis=-1)


def _seen(batch: Sequences, queries: slice, keys: slice, window: int | None, chunk: int | None) -> jax.Array:
    """Which keys each query of a block sees: [B or 1, Q, S]."""
    ahead_QS = np.arange(queries.start, queries.stop)[:, None] - np.arange(keys.start, keys.stop)
    seen_QS = ahead_QS >= 0
    if window is not None:
        seen_QS &= ahead_QS < window
    seen = jnp.asarray(seen_QS[None])
    if not batch.single:
        segments = batch.segments_BS
        seen = seen & (segments[:, queries, None] == segments[:, None, keys])
    if chunk is not None:
        chunks = batch.positions_BS // chunk
        seen = seen & (chunks[:, queries, None] == chunks[:, None, keys])
    return seen


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _block(
    q_BKGQh: jax.Array,
    k_BKSh: jax.Array,
    v_BKSh: jax.Array,
    sinks_KG: jax.Array | None,
    seen_BQS: jax.Array,
    scale: float,
    softcap: float | None,
    keeps: bool,
) -> jax.Array:
    """Q queries against the keys that any of them sees: out_BKGQh, float32.

    Args:
        keeps: weights stay for the backward pass, which computes them again where they do not.
    """
    out, _ = _forward(q_BKGQh, k_BKSh, v_BKSh, sinks_KG, seen_BQS, scale, softcap, keeps)
    return out


class _Weights(NamedTuple):
    """Of a block's queries: e to the scores above the best one, and what they add up to.

    Attributes:
        weight_BKGQS, total_BKGQ: float32, the sink's part in the total.
        sink_BKGQ: the sink's part; None where there is none.
        slope_BKGQS: of the cap at each score; None where there is none.
    """

    weight_BKGQS: jax.Array
    total_BKGQ: jax.Array
    sink_BKGQ: jax.Array | None
    slope_BKGQS: jax.Array | None


def _weights(
    q_BKGQh: jax.Array,
    k_BKSh: jax.Array,
    sinks_KG: jax.Array | None,
    seen_BQS: jax.Array,
    scale: float,
    softcap: float | None,
) -> _Weights:
    q_BKGQh = (q_BKGQh.astype(jnp.float32) * scale).astype(k_BKSh.dtype)
    score, slope = _product("bkqh,bksh->bkqs", _rows(q_BKGQh), k_BKSh).reshape(*q_BKGQh.shape[:4], -1), None
    if softcap is not None:
        bent = jnp.tanh(score / softcap)
        score, slope = softcap * bent, 1.0 - bent * bent
    score = jnp.where(seen_BQS[:, None, None], score, _UNSEEN)
    best = score.max(axis=-1)
    sink = None if sinks_KG is None else sinks_KG.astype(jnp.float32)[None, :, :, None]
    best = best if sink is None else jnp.maximum(best, sink)
    weight = jnp.exp(score - best[..., None])
    total = weight.sum(axis=-1)
    if sink is None:
        return _Weights(weight, total, None, slope)
    sink = jnp.exp(sink - best)  # a key of that weight that has no value
    return _Weights(weight, total + sink, sink, slope)


def _rows(x: jax.Array) -> jax.Array:
    """[B, K, G, Q, X] -> [B, K, G Q, X]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _product(what: str, one: jax.Array, other: jax.Array) -> jax.Array:
    """float32; both are rounded to the second one's dtype."""
    precision = jax.lax.Precision.HIGHEST if other.dtype == jnp.float32 else None
    return jnp.einsum(what, one.astype(other.dtype), other, precision=precision, preferred_element_type=jnp.float32)


def _forward(
    q_BKGQh: jax.Array,
    k_BKSh: jax.Array,
    v_BKSh: jax.Array,
    sinks_KG: jax.Array | None,
    seen_BQS: jax.Array,
    scale: float,
    softcap: float | None,
    keeps: bool,
) -> tuple[jax.Array, Any]:
    found = _weights(q_BKGQh, k_BKSh, sinks_KG, seen_BQS, scale, softcap)
    # Divided last: scores are gone through less often, forward and backward.
    out = _product("bkqs,bksh->bkqh", _rows(found.weight_BKGQS), v_BKSh).reshape(*q_BKGQh.shape[:4], -1)
    out = out / found.total_BKGQ[..., None]
    return out, (q_BKGQh, k_BKSh, v_BKSh, sinks_KG, seen_BQS, found if keeps else None, out)


def _backward(
    scale: float, softcap: float | None, keeps: bool, kept: Any, dout_BKGQh: jax.Array
) -> tuple[jax.Array | None, ...]:
    q_BKGQh, k_BKSh, v_BKSh, sinks_KG, seen_BQS, found, out_BKGQh = kept
    if found is None:
        q_again, k_again = jax.lax.optimization_barrier(
            (q_BKGQh, k_BKSh)
        )  # else the first ones would be kept after all
        found = _weights(q_again, k_again, sinks_KG, seen_BQS, scale, softcap)
    own = (dout_BKGQh * out_BKGQh).sum(axis=-1)
    dout = _rows(dout_BKGQh / found.total_BKGQ[..., None])
    dvalue = _product("bkqh,bksh->bkqs", dout, v_BKSh).reshape(found.weight_BKGQS.shape)
    dscore = found.weight_BKGQS * (dvalue - (own / found.total_BKGQ)[..., None])
    if found.slope_BKGQS is not None:
        dscore = dscore * found.slope_BKGQS
    dscore_BKRS = _rows(dscore).astype(k_BKSh.dtype)
    q_BKRh = _rows((q_BKGQh.astype(jnp.float32) * scale).astype(k_BKSh.dtype))
    dq = _product("bkqs,bksh->bkqh", dscore_BKRS, k_BKSh).reshape(q_BKGQh.shape) * scale
    dk = _product("bkqs,bkqh->bksh", dscore_BKRS, q_BKRh)
    dv = _product("bkqs,bkqh->bksh", _rows(found.weight_BKGQS).astype(v_BKSh.dtype), dout.astype(v_BKSh.dtype))
    dsinks = None
    if sinks_KG is not None:
        dsinks = (-own * found.sink_BKGQ / found.total_BKGQ).sum(axis=(0, 3)).astype(sinks_KG.dtype)
    return dq.astype(q_BKGQh.dtype), dk.astype(k_BKSh.dtype), dv.astype(v_BKSh.dtype), dsinks, None


_block.defvjp(_forward, _backward)
