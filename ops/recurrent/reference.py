"""Recurrent layers token by token in numpy: slow, obvious, and what every body is tested against."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ops.recurrent.batch import RecurrentBatch


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One sequence of a step.

    Attributes:
        slot: of its state.
        begins: its first token is at position 0.
        kept, shown: tokens whose effect on the state stays, and tokens behind them whose effect goes with the step.
    """

    slot: int
    begins: bool
    kept: list[int]
    shown: list[int]


def sequences(batch: RecurrentBatch) -> Iterator[Sequence]:
    """The real sequences of a step."""
    Q, P = batch.queries, batch.replayed
    for b in range(batch.num_decode):
        count, slot, begins = (
            int(x[b]) for x in (batch.decode_count_B, batch.decode_slot_B, batch.decode_start_B == 0)
        )
        if not count:
            continue
        new = list(range(b * Q + P, b * Q + P + count))
        if batch.accepted_B is None:
            yield Sequence(slot, bool(begins), new, [])
        else:
            yield Sequence(slot, bool(begins), list(range(b * Q, b * Q + int(batch.accepted_B[b]))), new)
    for r in range(batch.chunk_qlen_R.shape[0]):
        count, first = int(batch.chunk_qlen_R[r]), batch.num_decode_tokens + int(batch.chunk_first_R[r])
        if count:
            begins = int(batch.chunk_start_R[r]) == 0
            yield Sequence(int(batch.chunk_slot_R[r]), begins, list(range(first, first + count)), [])


def _run(batch: RecurrentBatch, state: np.ndarray, step: Callable[[np.ndarray, int], np.ndarray]) -> None:
    """Walks all sequences: `step(S, t)` gives the state behind token t."""
    for each in sequences(batch):
        S = np.zeros_like(state[each.slot]) if each.begins else state[each.slot]
        for t in each.kept:
            S = step(S, t)
        state[each.slot] = S
        for t in each.shown:
            S = step(S, t)


def short_conv(
    x_TD: np.ndarray,
    kernel_WD: np.ndarray,
    bias_D: np.ndarray | None,
    state_SwD: np.ndarray,
    batch: RecurrentBatch,
    activation: str = "silu",
) -> tuple[np.ndarray, np.ndarray]:
    """See ops.recurrent.short_conv."""
    x, kernel = np.asarray(x_TD, np.float64), np.asarray(kernel_WD, np.float64)
    state, out = np.array(state_SwD, np.float64), np.zeros(x.shape)

    def step(past: np.ndarray, t: int) -> np.ndarray:
        window = np.concatenate([past, x[t][None]])
        y = (window * kernel).sum(axis=0) + (0.0 if bias_D is None else np.asarray(bias_D, np.float64))
        out[t] = y / (1.0 + np.exp(-y)) if activation == "silu" else y
        return window[1:]

    _run(batch, state, step)
    return out, state


def matrix_recurrence(
    q_TKn: np.ndarray,
    k_TKn: np.ndarray,
    v_THp: np.ndarray,
    log_decay: np.ndarray,
    beta_TH: np.ndarray | None,
    state_SHnp: np.ndarray,
    batch: RecurrentBatch,
) -> tuple[np.ndarray, np.ndarray]:
    """See ops.recurrent.matrix_recurrence."""
    copies = v_THp.shape[1] // q_TKn.shape[1]
    q, k = (np.repeat(np.asarray(x, np.float64), copies, axis=1) for x in (q_TKn, k_TKn))
    v, g = np.asarray(v_THp, np.float64), np.asarray(log_decay, np.float64)
    decay = np.exp(g if g.ndim == 3 else g[..., None])[..., None]
    state, out = np.array(state_SHnp, np.float64), np.zeros(v.shape)

    def step(S: np.ndarray, t: int) -> np.ndarray:
        S = decay[t] * S
        write = v[t]
        if beta_TH is not None:
            write = np.asarray(beta_TH, np.float64)[t][:, None] * (v[t] - np.einsum("hnp,hn->hp", S, k[t]))
        S = S + k[t][:, :, None] * write[:, None, :]
        out[t] = np.einsum("hnp,hn->hp", S, q[t])
        return S

    _run(batch, state, step)
    return out, state


def gated_delta(
    x_TX: np.ndarray,
    gates_TJ: np.ndarray,
    weights: tuple[Any, ...],
    conv_SwC: np.ndarray,
    matrix_SHnp: np.ndarray,
    batch: RecurrentBatch,
    key_heads: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """See ops.recurrent.gated_delta; `weights` are a DeltaWeights."""
    kernel_WC, rate_H, dt_bias_H, gain_p, eps, reach, activation = weights
    (T, K), (_, H, n, p) = (x_TX.shape[0], key_heads), matrix_SHnp.shape
    x_TKc = np.asarray(x_TX, np.float64).reshape(T, K, -1)
    gates_TK2G = np.asarray(gates_TJ, np.float64).reshape(T, K, 2, -1)
    width = kernel_WC.shape[1] // K
    mixed_TC, conv = short_conv(x_TKc[:, :, :width].reshape(T, -1), kernel_WC, None, conv_SwC, batch, activation)
    mixed_TKc = mixed_TC.reshape(T, K, width)
    q_TKn, k_TKn = (mixed_TKc[:, :, i * n : (i + 1) * n] for i in range(2))
    q_TKn, k_TKn = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q_TKn, k_TKn))
    step_TH = gates_TK2G[:, :, 1].reshape(T, H) + dt_bias_H
    out_THp, matrix = matrix_recurrence(
        q_TKn / np.sqrt(n),
        k_TKn,
        mixed_TKc[:, :, 2 * n :].reshape(T, H, p),
        rate_H * np.logaddexp(0.0, step_TH),
        reach / (1.0 + np.exp(-gates_TK2G[:, :, 0].reshape(T, H))),
        matrix_SHnp,
        batch,
    )
    z_THp = x_TKc[:, :, width:].reshape(T, H, p)
    out_THp = out_THp / np.sqrt((out_THp * out_THp).mean(-1, keepdims=True) + eps) * gain_p
    return (out_THp * z_THp / (1.0 + np.exp(-z_THp))).reshape(T, H * p), conv, matrix


def selective_scan(
    x_TD: np.ndarray,
    dt_TD: np.ndarray,
    A_ND: np.ndarray,
    B_TN: np.ndarray,
    C_TN: np.ndarray,
    state_SND: np.ndarray,
    batch: RecurrentBatch,
) -> tuple[np.ndarray, np.ndarray]:
    """See ops.recurrent.selective_scan."""
    x, dt, A, B, C = (np.asarray(a, np.float64) for a in (x_TD, dt_TD, A_ND, B_TN, C_TN))
    state, out = np.array(state_SND, np.float64), np.zeros(x.shape)

    def step(S: np.ndarray, t: int) -> np.ndarray:
        S = np.exp(dt[t] * A) * S + B[t][:, None] * (dt[t] * x[t])
        out[t] = C[t] @ S
        return S

    _run(batch, state, step)
    return out, state
