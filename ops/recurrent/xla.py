"""Recurrent layers in plain XLA: decode rows token by token, chunks in blocks whose inner work is matrix products.

Prefill follows the chunked form of the gated delta rule (Yang et al. 2024, arXiv:2412.06464) and of the state space dual
(Dao & Gu 2024, arXiv:2405.21060): inside a block everything that needs no state is computed for all blocks at once; a scan over
blocks carries the states.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ops.recurrent.batch import Blocks, RecurrentBatch, blocks

SCALAR_BLOCK = 64
"""Tokens a block where a head decays as a whole."""
CHANNEL_BLOCK = 16
"""Tokens a block where every channel decays on its own: decays between two tokens are then [n] each, and are kept in memory."""

_EXACT = jax.lax.Precision.HIGHEST


def short_conv(
    x_TD: jax.Array,
    kernel_WD: jax.Array,
    bias_D: jax.Array | None,
    state_SwD: jax.Array,
    batch: RecurrentBatch,
    activation: str | None,
) -> tuple[jax.Array, jax.Array]:
    """See ops.recurrent.short_conv."""
    W = kernel_WD.shape[0]
    w, B, Q, C = W - 1, batch.num_decode, batch.queries, batch.num_chunk
    x_TD, kernel_WD = x_TD.astype(jnp.float32), kernel_WD.astype(jnp.float32)
    parts = []
    if B:
        past_BwD = _begin(state_SwD, batch.decode_slot_B, batch.decode_start_B).astype(jnp.float32)
        new_BQD = x_TD[: B * Q].reshape(B, Q, -1)
        kept_B = batch.decode_count_B
        if batch.accepted_B is not None:  # what was repeated and not accepted is left out: the new tokens move up to it
            kept_B = batch.accepted_B
            new_BQD = _close_gap(new_BQD, batch.accepted_B, batch.replayed)
        seen_BqD = jnp.concatenate([past_BwD, new_BQD], axis=1)  # q = w + Q
        taps = [seen_BqD[:, j : j + Q] * kernel_WD[j] for j in range(W)]
        out_BQD = functools.reduce(jnp.add, taps)
        if batch.accepted_B is not None:
            out_BQD = _open_gap(out_BQD, batch.accepted_B, batch.replayed)
        parts.append(out_BQD.reshape(B * Q, -1))
        last_BwD = jax.vmap(lambda seen_qD, at: jax.lax.dynamic_slice_in_dim(seen_qD, at, w))(seen_BqD, kept_B)
        state_SwD = _keep(state_SwD, batch.decode_slot_B, last_BwD, batch.decode_count_B)
    if C:
        x_CD = x_TD[B * Q :]
        past_RwD = _begin(state_SwD, batch.chunk_slot_R, batch.chunk_start_R).astype(jnp.float32)
        row_C, at_C = _rows_of_tokens(batch, C)
        out_CD = x_CD * kernel_WD[w]
        for back in range(1, W):  # the token `back` places before: in this piece, or in the state
            inside_CD = jnp.pad(x_CD, ((back, 0), (0, 0)))[:C]
            before_CD = past_RwD[row_C, jnp.clip(w - back + at_C, 0, w - 1)]
            out_CD += jnp.where((at_C >= back)[:, None], inside_CD, before_CD) * kernel_WD[w - back]
        parts.append(out_CD)
        back_w = jnp.arange(w) - w  # the last w tokens: of the piece, or of the state where the piece is shorter
        at_Rw = batch.chunk_qlen_R[:, None] + back_w
        inside_RwD = x_CD[jnp.clip(batch.chunk_first_R[:, None] + at_Rw, 0, C - 1)]
        before_RwD = jnp.take_along_axis(past_RwD, jnp.clip(at_Rw + w, 0, w - 1)[..., None], axis=1)
        last_RwD = jnp.where((at_Rw >= 0)[..., None], inside_RwD, before_RwD)
        state_SwD = _keep(state_SwD, batch.chunk_slot_R, last_RwD, batch.chunk_qlen_R)
    out_TD = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    if bias_D is not None:
        out_TD = out_TD + bias_D.astype(jnp.float32)
    return (jax.nn.silu(out_TD) if activation == "silu" else out_TD), state_SwD


def matrix_recurrence(
    q_TKn: jax.Array,
    k_TKn: jax.Array,
    v_THp: jax.Array,
    log_decay: jax.Array,
    beta_TH: jax.Array | None,
    state_SHnp: jax.Array,
    batch: RecurrentBatch,
) -> tuple[jax.Array, jax.Array]:
    """See ops.recurrent.matrix_recurrence."""
    H, copies = v_THp.shape[1], v_THp.shape[1] // q_TKn.shape[1]
    inputs: list[Any] = [jnp.repeat(x.astype(jnp.float32), copies, axis=1) for x in (q_TKn, k_TKn)]
    inputs += [v_THp.astype(jnp.float32), log_decay.astype(jnp.float32)]
    inputs.append(None if beta_TH is None else beta_TH.astype(jnp.float32))
    BQ = batch.num_decode_tokens
    parts = []
    if BQ:

        def step(S_BHnp: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            q_BHn, k_BHn, v_BHp, g, *rest = now
            S_BHnp = S_BHnp * jnp.exp(g if g.ndim == 3 else g[..., None])[..., None]
            if rest:
                seen_BHp = jnp.einsum("bhnp,bhn->bhp", S_BHnp, k_BHn, precision=_EXACT)
                v_BHp = rest[0][..., None] * (v_BHp - seen_BHp)
            S_BHnp = S_BHnp + k_BHn[..., None] * v_BHp[..., None, :]
            return S_BHnp, jnp.einsum("bhnp,bhn->bhp", S_BHnp, q_BHn, precision=_EXACT)

        out_TH, state_SHnp = _decode(step, [x[:BQ] for x in inputs if x is not None], state_SHnp, batch)
        parts.append(out_TH)
    if batch.num_chunk:
        length = SCALAR_BLOCK if log_decay.ndim == 2 else CHANNEL_BLOCK
        cut = blocks(batch, min(length, -(-batch.num_chunk // 16) * 16))
        chunk = [None if x is None else _in_blocks(x[BQ:], cut) for x in inputs]
        out_NLHp, state_SHnp = _matrix_blocks(chunk, state_SHnp, batch, cut)
        parts.append(_out_of_blocks(out_NLHp, cut, batch.num_chunk))
    out_THp = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return out_THp.reshape(-1, H, v_THp.shape[2]), state_SHnp


def _matrix_blocks(
    inputs: list[Any], state_SHnp: jax.Array, batch: RecurrentBatch, cut: Blocks
) -> tuple[jax.Array, jax.Array]:
    q_NLHn, k_NLHn, v_NLHp, g, beta_NLH = inputs
    L = cut.length
    real_NL = jnp.arange(L) < cut.count_N[:, None]
    real_NL11 = real_NL[..., None, None]
    k_NLHn, v_NLHp = jnp.where(real_NL11, k_NLHn, 0.0), jnp.where(real_NL11, v_NLHp, 0.0)
    g = jnp.where(real_NL11 if g.ndim == 4 else real_NL[..., None], g, 0.0)
    total = jnp.cumsum(g, axis=1)  # log of what is left at token i of what was there before the block
    # [i, j]: log of what is left at token i of what token j wrote; never positive, so that nothing overflows.
    later_LL = jnp.arange(L)[:, None] >= jnp.arange(L)
    pair = total[:, :, None] - total[:, None]  # [N, i, j, H] or [N, i, j, H, n]
    pair = jnp.exp(jnp.where(later_LL[..., None] if g.ndim == 3 else later_LL[..., None, None], pair, -jnp.inf))
    if g.ndim == 3:
        meet_NHij = jnp.einsum("nihk,njhk->nhij", q_NLHn, k_NLHn, precision=_EXACT) * pair.transpose(0, 3, 1, 2)
        shrink = jnp.exp(total)[..., None]
        rest = jnp.exp(total[:, -1:] - total)[..., None]
        whole_NHn = jnp.exp(total[:, -1])[..., None]
    else:
        meet_NHij = jnp.einsum("nihk,njhk,nijhk->nhij", q_NLHn, k_NLHn, pair, precision=_EXACT)
        shrink, rest, whole_NHn = jnp.exp(total), jnp.exp(total[:, -1:] - total), jnp.exp(total[:, -1])
    q_NLHn, late_NLHn = q_NLHn * shrink, k_NLHn * rest
    reads_NLHn = None
    if beta_NLH is not None:
        beta_NLH = jnp.where(real_NL[..., None], beta_NLH, 0.0)
        kb_NLHn = k_NLHn * beta_NLH[..., None]
        if g.ndim == 3:
            own_NHij = jnp.einsum("nihk,njhk->nhij", kb_NLHn, k_NLHn, precision=_EXACT) * pair.transpose(0, 3, 1, 2)
        else:
            own_NHij = jnp.einsum("nihk,njhk,nijhk->nhij", kb_NLHn, k_NLHn, pair, precision=_EXACT)
        lower_NHij = jnp.tril(own_NHij, -1)
        right = jnp.concatenate([v_NLHp * beta_NLH[..., None], kb_NLHn * shrink], axis=-1).swapaxes(1, 2)
        solved = jax.lax.linalg.triangular_solve(
            lower_NHij + jnp.eye(L), right, left_side=True, lower=True, unit_diagonal=True
        ).swapaxes(1, 2)
        v_NLHp, reads_NLHn = solved[..., : v_NLHp.shape[-1]], solved[..., v_NLHp.shape[-1] :]

    start_RHnp = _begin(state_SHnp, batch.chunk_slot_R, batch.chunk_start_R).astype(jnp.float32)
    R = start_RHnp.shape[0]

    def scan(S_RHnp: jax.Array, now: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        row, q_LHn, late_LHn, v_LHp, meet_Hij, whole_Hn, reads_LHn = now
        S_Hnp = S_RHnp[jnp.minimum(row, R - 1)]
        if reads_LHn is not None:
            v_LHp = v_LHp - jnp.einsum("lhk,hkp->lhp", reads_LHn, S_Hnp, precision=_EXACT)
        out_LHp = jnp.einsum("lhk,hkp->lhp", q_LHn, S_Hnp, precision=_EXACT)
        out_LHp += jnp.einsum("hij,jhp->ihp", meet_Hij, v_LHp, precision=_EXACT)
        S_Hnp = S_Hnp * whole_Hn[..., None] + jnp.einsum("lhk,lhp->hkp", late_LHn, v_LHp, precision=_EXACT)
        return S_RHnp.at[row].set(S_Hnp, mode="drop"), out_LHp  # row R is nobody's

    operands = (cut.row_N, q_NLHn, late_NLHn, v_NLHp, meet_NHij, whole_NHn, reads_NLHn)
    end_RHnp, out_NLHp = jax.lax.scan(scan, start_RHnp, operands)
    return out_NLHp, _keep(state_SHnp, batch.chunk_slot_R, end_RHnp, batch.chunk_qlen_R)


def selective_scan(
    x_TD: jax.Array,
    dt_TD: jax.Array,
    A_ND: jax.Array,
    B_TN: jax.Array,
    C_TN: jax.Array,
    state_SND: jax.Array,
    batch: RecurrentBatch,
) -> tuple[jax.Array, jax.Array]:
    """See ops.recurrent.selective_scan."""
    inputs = [a.astype(jnp.float32) for a in (x_TD, dt_TD, B_TN, C_TN)]
    A_ND = A_ND.astype(jnp.float32)
    BQ = batch.num_decode_tokens

    def step(S_XND: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x_XD, dt_XD, B_XN, C_XN = now
        S_XND = S_XND * jnp.exp(dt_XD[:, None] * A_ND) + B_XN[..., None] * (dt_XD * x_XD)[:, None]
        return S_XND, jnp.einsum("xnd,xn->xd", S_XND, C_XN, precision=_EXACT)

    parts = []
    if BQ:
        out_TD, state_SND = _decode(step, [x[:BQ] for x in inputs], state_SND, batch)
        parts.append(out_TD)
    if batch.num_chunk:
        cut = blocks(batch, 16)
        start_RND = _begin(state_SND, batch.chunk_slot_R, batch.chunk_start_R).astype(jnp.float32)
        R = start_RND.shape[0]

        def scan(S_RND: jax.Array, now: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
            row, count, *block = now

            def one(S_ND: jax.Array, token: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
                real, *inputs = token
                new_XND, out_XD = step(S_ND[None], tuple(a[None] for a in inputs))
                return jnp.where(real, new_XND[0], S_ND), out_XD[0]

            S_ND, out_LD = jax.lax.scan(one, S_RND[jnp.minimum(row, R - 1)], (jnp.arange(cut.length) < count, *block))
            return S_RND.at[row].set(S_ND, mode="drop"), out_LD

        chunk = [_in_blocks(x[BQ:], cut) for x in inputs]
        end_RND, out_NLD = jax.lax.scan(scan, start_RND, (cut.row_N, cut.count_N, *chunk))
        state_SND = _keep(state_SND, batch.chunk_slot_R, end_RND, batch.chunk_qlen_R)
        parts.append(_out_of_blocks(out_NLD, cut, batch.num_chunk))
    return (parts[0] if len(parts) == 1 else jnp.concatenate(parts)), state_SND


def _decode(
    step: Callable[[jax.Array, tuple[jax.Array, ...]], tuple[jax.Array, jax.Array]],
    inputs: list[jax.Array],
    state: jax.Array,
    batch: RecurrentBatch,
) -> tuple[jax.Array, jax.Array]:
    """Decode rows token by token: outputs [B * Q, ...] and the states."""
    B, Q, P = batch.num_decode, batch.queries, batch.replayed
    S = _begin(state, batch.decode_slot_B, batch.decode_start_B).astype(jnp.float32)
    outs, kept = [], S
    for j in range(Q):
        new, out = step(S, tuple(x.reshape(B, Q, *x.shape[1:])[:, j] for x in inputs))
        real_B = batch.accepted_B > j if j < P and batch.accepted_B is not None else batch.decode_count_B > j - P
        S = jnp.where(real_B.reshape(B, *(1,) * (S.ndim - 1)), new, S)
        outs.append(out)
        if P == 0 or j == P - 1:
            kept = S
    out = jnp.stack(outs, axis=1)
    return out.reshape(B * Q, *out.shape[2:]), _keep(state, batch.decode_slot_B, kept, batch.decode_count_B)


def _begin(state: jax.Array, slot_X: jax.Array, start_X: jax.Array) -> jax.Array:
    """The states of slots; zeros for sequences that begin."""
    old = state[slot_X]
    return jnp.where((start_X == 0).reshape(-1, *(1,) * (old.ndim - 1)), jnp.zeros((), old.dtype), old)


def _keep(state: jax.Array, slot_X: jax.Array, new: jax.Array, count_X: jax.Array) -> jax.Array:
    """Writes states into their slots; rows without tokens write nothing."""
    slot_X = jnp.where(count_X > 0, slot_X, state.shape[0])
    return state.at[slot_X].set(new.astype(state.dtype), mode="drop")


def _close_gap(x_BQD: jax.Array, accepted_B: jax.Array, replayed: int) -> jax.Array:
    """Accepted repeated tokens, then at once the new ones; what follows is arbitrary."""
    at_Q = jnp.arange(x_BQD.shape[1])
    skip_B1 = (replayed - accepted_B)[:, None]
    from_BQ = jnp.where(at_Q < accepted_B[:, None], at_Q, jnp.minimum(at_Q + skip_B1, x_BQD.shape[1] - 1))
    return jnp.take_along_axis(x_BQD, from_BQ[..., None], axis=1)


def _open_gap(x_BQD: jax.Array, accepted_B: jax.Array, replayed: int) -> jax.Array:
    """The reverse of `_close_gap` for the accepted and the new tokens."""
    at_Q = jnp.arange(x_BQD.shape[1])
    skip_B1 = (replayed - accepted_B)[:, None]
    from_BQ = jnp.where(at_Q < replayed, at_Q, at_Q - skip_B1)
    return jnp.take_along_axis(x_BQD, from_BQ[..., None], axis=1)


def _rows_of_tokens(batch: RecurrentBatch, C: int) -> tuple[jax.Array, jax.Array]:
    """Of each chunk token: its piece, and how many tokens of the piece are before it. Arbitrary for padding."""
    order_C = jnp.arange(C, dtype=jnp.int32)
    # Padded pieces come last, whatever their `first` says.
    first_R = jnp.where(batch.chunk_qlen_R > 0, batch.chunk_first_R, C)
    row_C = jnp.sum(order_C[:, None] >= first_R, axis=1) - 1
    row_C = jnp.argsort(first_R)[jnp.clip(row_C, 0, first_R.shape[0] - 1)]
    return row_C, order_C - batch.chunk_first_R[row_C]


def _in_blocks(x: jax.Array, cut: Blocks) -> jax.Array:
    """[C, ...] to [N, L, ...]; tokens behind a block's count are arbitrary, but of the step."""
    at_NL = cut.first_N[:, None] + jnp.arange(cut.length)
    return x[jnp.minimum(at_NL, x.shape[0] - 1)]


def _out_of_blocks(out: jax.Array, cut: Blocks, C: int) -> jax.Array:
    """[N, L, ...] to [C, ...]; zeros at padding."""
    at_NL = cut.first_N[:, None] + jnp.arange(cut.length)
    at_NL = jnp.where(jnp.arange(cut.length) < cut.count_N[:, None], at_NL, C)
    return jnp.zeros((C, *out.shape[2:]), out.dtype).at[at_NL].set(out, mode="drop")
