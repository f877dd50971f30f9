"""Attention to what every query sees all of: an image's patches among themselves, a text's tokens to the sound that they write
down. By the CPU's own kernels; elsewhere models write it out.

Patches attend in int8 where the CPU multiplies that fastest (`ops/native/whole/`), else in bfloat16 over pages. Keys and values
that are kept lie in pages of 16 positions, a page of K and behind it one of V, as `pages` has them in `panels`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ops.linear import PackedInt8Weight, Weight, linear
from ops.norm import TakenNorm
from ops.paged_attention import native
from ops.paged_attention.batch import AttentionBatch, KVSpec

PAGE = 16


def supports(heads: int, head_dim: int, platform: str) -> bool:
    """Whether there is a kernel for such heads."""
    return native.supports(KVSpec(heads, head_dim, head_dim), PAGE, jnp.dtype(jnp.bfloat16), platform)


def attend_all(
    qkv_RSHgh: jax.Array,
    count_R: jax.Array,
    *,
    scale: float,
    angles: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """In each of R rows, S tokens attend to the row's first `count` ones: out_RSHh, zeros for the others.

    Args:
        qkv_RSHgh: float32 [R, S, H, 3, h], of each head q, k and v; where `supports` says so.
        count_R: int32, at most S.
        angles: cosines and sines [R S, h / 2] by which q and k turn, as `ops.rope.cos_sin` gives them; None: they do not.
    """
    R, S, H, _, h = qkv_RSHgh.shape
    if native.in_int8(h):
        return native.attend_among(qkv_RSHgh.reshape(R * S, H, 3, h), count_R, scale, angles).reshape(R, S, H, h)
    pages_RP = 1 + np.arange(R * -(-S // PAGE), dtype=np.int32).reshape(R, -1)  # page 0 is nobody's
    place_S = np.arange(S)
    index_T = (pages_RP[:, place_S // PAGE] * PAGE + place_S % PAGE).reshape(-1)
    k = jnp.zeros((pages_RP.size + 1, H, h // 2, PAGE, 2), jnp.bfloat16)
    v = jnp.zeros((pages_RP.size + 1, H, PAGE // 2, h, 2), jnp.bfloat16)
    return native.attend_whole(
        qkv_RSHgh.reshape(R * S, H, 3, h),
        (k, v),
        jnp.asarray(index_T, jnp.int32),
        _rows(jnp.asarray(pages_RP), jnp.arange(R, dtype=jnp.int32) * S, count_R, count_R),
        scale=scale,
        angles=angles,
    ).reshape(R, S, H, h)


def kept_size(positions: int, heads: int, head_dim: int) -> int:
    """Numbers that `keep` makes of so many positions."""
    return -(-positions // PAGE) * PAGE * heads * head_dim * 2


def keep(k_SHh: jax.Array, v_SHh: jax.Array) -> jax.Array:
    """uint16 [kept_size], the bits of bfloat16: keys and values as `attend_kept` reads them. On a CPU XLA turns a whole array of
    bfloat16 into float32 and back where a part of it is moved or changed."""
    (S, H, h), more = k_SHh.shape, -k_SHh.shape[0] % PAGE
    bits = (jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16) for x in (k_SHh, v_SHh))
    k_SHh, v_SHh = (jnp.pad(x, ((0, more), (0, 0), (0, 0))) for x in bits)
    P = (S + more) // PAGE
    k = k_SHh.reshape(P, PAGE, H, h // 2, 2).transpose(0, 2, 3, 1, 4).reshape(P, -1)
    v = v_SHh.reshape(P, PAGE // 2, 2, H, h).transpose(0, 3, 1, 4, 2).reshape(P, -1)
    return jnp.stack([k, v], axis=1).reshape(-1)


def keep_products(
    x_SD: jax.Array,
    weights: Sequence[Weight],
    biases: Sequence[jax.Array | None],
    heads: int,
    norm: TakenNorm | None = None,
) -> jax.Array:
    """uint16 [weights of kept_size each]: what `keep` makes of each product's keys and values.

    Args:
        weights: [2 D, D] each, whose outputs are [H, K and V, h].
        biases: [2 D] each, or None.
        norm: applied to x first.
    """
    S, h = len(x_SD), weights[0].shape[0] // (2 * heads)
    packed = [one for one in weights if isinstance(one, PackedInt8Weight)]
    if len(packed) == len(weights) and len({one.rotated for one in packed}) == 1:
        return native.kept(x_SD, packed, biases, heads, norm, len(weights) * kept_size(S, heads, h))
    x_SD = x_SD if norm is None else norm(x_SD)
    parts = [linear(x_SD, *one).reshape(S, heads, 2, h) for one in zip(weights, biases, strict=True)]
    return jnp.concatenate([keep(part[:, :, 0], part[:, :, 1]) for part in parts])


def kept_keys(kept: jax.Array, positions: int, heads: int, head_dim: int) -> jax.Array:
    """k_SHh of what `keep` made."""
    pages = kept.reshape(-1, 2, heads, head_dim // 2, PAGE, 2)[:, 0]
    bits = pages.transpose(0, 3, 1, 2, 4).reshape(-1, heads, head_dim)[:positions]
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def attend_kept(
    q_THh: jax.Array,
    store_MW: jax.Array,
    row_B: jax.Array,
    row_R: jax.Array,
    batch: AttentionBatch,
    *,
    positions: int,
    part: int,
    scale: float,
) -> jax.Array:
    """A step's tokens attend to things that are kept, each to all of its row's one: out_THh, zeros for padding.

    Args:
        store_MW: uint16 [M, parts of kept_size each], of M things what `keep` made of each of their parts (layers).
        row_B, row_R: int32, which of them the decode rows' and the chunk rows' is.
        batch: where tokens stand; a decode row has one place.
        part: of each thing.
    """
    T, H, h = q_THh.shape
    P = -(-positions // PAGE)
    parts = store_MW.shape[1] // kept_size(positions, H, h)
    pages = store_MW.reshape(-1, H, h // 2, PAGE, 2)
    pages_P = 2 * (part * P + jnp.arange(P, dtype=jnp.int32))
    first = 2 * parts * P
    lasting = jnp.int32(positions)
    return native.attend_whole(
        q_THh[:, :, None],
        (pages,),
        jnp.zeros(T, jnp.int32),
        _rows(
            row_R[:, None] * first + pages_P,
            batch.chunk_start_R,
            batch.chunk_qlen_R,
            jnp.where(batch.chunk_qlen_R > 0, lasting, 0),
        ),
        (row_B[:, None] * first + pages_P, jnp.where(batch.row_queries > 0, lasting, 0)),
        scale=scale,
    )[:, :, 0]


def attend_kept_once(q_THh: jax.Array, row_1W: jax.Array, *, positions: int, part: int, scale: float) -> jax.Array:
    """`attend_kept` of tokens that are all of one thing."""
    none = jnp.zeros(0, jnp.int32)
    one = jnp.full(1, len(q_THh), jnp.int32)
    batch = AttentionBatch(none, none.reshape(0, 1), none, none.reshape(1, 0), jnp.zeros(1, jnp.int32), one, one, none)
    where_1 = jnp.zeros(1, jnp.int32)
    return attend_kept(q_THh, row_1W, none, where_1, batch, positions=positions, part=part, scale=scale)


def _rows(pages_RP: jax.Array, *more: jax.Array) -> tuple[jax.Array, ...]:
    """(pages, first token, tokens, context) of chunk rows."""
    return (pages_RP.astype(jnp.int32), *(x.astype(jnp.int32) for x in more))
