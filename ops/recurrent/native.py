"""The CPU's own recurrent layers: C++ handlers that change states where they lie. See `ops/native/recurrent.cc`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ops import native
from ops.recurrent.batch import RecurrentBatch

_LANES = 16  # as in recurrent.h
_MAX_CHANNELS = 512


def short_conv(
    x_TD: jax.Array,
    kernel_WD: jax.Array,
    bias_D: jax.Array | None,
    state_SwD: jax.Array,
    batch: RecurrentBatch,
    activation: str,
) -> tuple[jax.Array, jax.Array]:
    """See ops.recurrent.short_conv."""
    _check(state_SwD, state_SwD.shape[2])
    bias = jnp.zeros(0, jnp.float32) if bias_D is None else bias_D
    return _call(
        "jaxserve_short_conv", (x_TD, kernel_WD, bias), x_TD.shape, (state_SwD,), batch, silu=activation == "silu"
    )


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
    _check(state_SHnp, state_SHnp.shape[3])
    if state_SHnp.shape[2] > _MAX_CHANNELS:
        raise NotImplementedError
    beta = jnp.zeros((0, 0), jnp.float32) if beta_TH is None else beta_TH
    operands = (q_TKn, k_TKn, v_THp, log_decay, beta)
    return _call("jaxserve_matrix_recurrence", operands, v_THp.shape, (state_SHnp,), batch)


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
    _check(state_SND, state_SND.shape[2])
    return _call("jaxserve_selective_scan", (x_TD, dt_TD, A_ND, B_TN, C_TN), x_TD.shape, (state_SND,), batch)


def gated_delta(
    x_TX: jax.Array,
    gates_TJ: jax.Array,
    own: Sequence[jax.Array],
    conv_SwC: jax.Array,
    matrix_SHnp: jax.Array,
    batch: RecurrentBatch,
    *,
    key_heads: int,
    eps: float,
    reach: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See ops.recurrent.gated_delta. Of `own`, the taps, rates, step biases and the norm's scales."""
    _, H, n, p = matrix_SHnp.shape
    _check(conv_SwC, n)
    _check(matrix_SHnp, p)
    if n > _MAX_CHANNELS:
        raise NotImplementedError
    shape = (x_TX.shape[0], H * p)
    attrs = {"key_heads": np.int64(key_heads), "eps": np.float32(eps), "reach": np.float32(reach)}
    return _call("jaxserve_gated_delta", (x_TX, gates_TJ, *own), shape, (conv_SwC, matrix_SHnp), batch, **attrs)


def _check(state: jax.Array, lanes: int) -> None:
    if state.dtype != jnp.float32 or lanes % _LANES or jax.default_backend() != "cpu" or not native.available():
        raise NotImplementedError


def _call(
    name: str,
    operands: tuple[jax.Array, ...],
    shape: tuple[int, ...],
    states: tuple[jax.Array, ...],
    batch: RecurrentBatch,
    **attrs: Any,
) -> Any:
    """(the result, the states behind the step)."""
    accepted = jnp.zeros(0, jnp.int32) if batch.accepted_B is None else batch.accepted_B
    inputs = [
        *(x.astype(jnp.float32) for x in operands),
        batch.decode_slot_B, batch.decode_start_B, batch.decode_count_B, accepted,
        batch.chunk_slot_R, batch.chunk_first_R, batch.chunk_start_R, batch.chunk_qlen_R,
    ]  # fmt: skip
    call = jax.ffi.ffi_call(
        native.target(name),
        [jax.ShapeDtypeStruct(shape, jnp.float32), *(jax.ShapeDtypeStruct(s.shape, s.dtype) for s in states)],
        input_output_aliases={len(inputs) + i: 1 + i for i in range(len(states))},
    )
    return tuple(call(*inputs, *states, queries=np.int32(batch.queries), replayed=np.int32(batch.replayed), **attrs))
