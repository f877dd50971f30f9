"""Layers that keep a state of fixed size: short convolutions, matrix states, and the selective scan.

One face a kind, several bodies: the first of `BACKENDS` that does not decline with NotImplementedError runs; `xla` never
declines. `RecurrentBatch` (batch.py) says which tokens belong to which state. Everything is float32 inside; states are
whatever their arrays are (float32 by default: errors of a state add up over a sequence). On a mesh each device runs its own
channels or heads, those that `axis` splits over the devices, or all where it is None.

`matrix_recurrence` is what most of today's recurrent layers have in common:

| layer | q, k, v | decay | beta |
|---|---|---|---|
| Gated DeltaNet (arXiv:2412.06464) | normalized q and k | one a head | yes |
| KDA (arXiv:2510.26692) | normalized q and k | one a channel of k | yes |
| Mamba-2 (arXiv:2405.21060) | C, B, dt * x | dt * A, one a head | none |
| lightning attention (arXiv:2401.04658) | q, k, v | a constant a head | none |
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ops.activation import activation as activation_function
from ops.per_device import per_device
from ops.recurrent import native, xla
from ops.recurrent.batch import RecurrentBatch
from ops.recurrent.states import States

__all__ = ["BACKENDS", "Held", "RecurrentBatch", "States", "matrix_recurrence", "selective_scan", "short_conv"]

BACKENDS: dict[str, Any] = {"native": native, "xla": xla}
"""Modules with the three functions, best first."""


def short_conv(
    x_TD: jax.Array,
    kernel_WD: jax.Array,
    bias_D: jax.Array | None,
    state_SwD: jax.Array,
    batch: RecurrentBatch,
    *,
    activation: str | None = "silu",
    mesh: Mesh | None = None,
    axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Depthwise causal convolution along each sequence: y_t = act(bias + sum_j kernel[j] * x_(t - W + 1 + j)).

    Args:
        x_TD: the step's inputs, any float dtype.
        kernel_WD: W taps, the newest token's last.
        bias_D: or None.
        state_SwD: of each slot its last w = W - 1 inputs, oldest first.
        activation: of `ops.activation`, or None.
        mesh, axis: which devices there are, and the mesh axis that splits the D channels.
    Returns:
        y_TD float32 (arbitrary at padded tokens), and the states behind this step.
    """

    own = {"silu": "silu", "swish": "silu"}.get(activation or "")  # the bodies' one; all others come behind them
    op = Op("short_conv", (1, 1, 0, 2, None), (1, 2), mesh, axis, (own,))
    y_TD, state_SwD = op((x_TD, kernel_WD, bias_D), state_SwD, batch)
    return (y_TD if own or activation is None else activation_function(activation)(y_TD)), state_SwD


def matrix_recurrence(
    q_TKn: jax.Array,
    k_TKn: jax.Array,
    v_THp: jax.Array,
    log_decay: jax.Array,
    beta_TH: jax.Array | None,
    state_SHnp: jax.Array,
    batch: RecurrentBatch,
    *,
    mesh: Mesh | None = None,
    axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A matrix a head that decays, is written to and read at every token of a sequence:

        S <- exp(log_decay_t) * S
        S <- S + k_t (x) beta_t (v_t - S^T k_t)     with beta, the delta rule
        S <- S + k_t (x) v_t                        without
        o_t = S^T q_t

    Args:
        q_TKn, k_TKn: K heads of n; each serves H / K neighbouring heads of v. Scale and norms are the caller's.
        v_THp: H heads of p.
        log_decay: [T, H], or [T, H, n] where channels of k decay on their own; at most 0.
        beta_TH: how far what k reads is replaced by v; None to add.
        state_SHnp: of each slot; float32 or narrower.
        mesh, axis: which devices there are, and the mesh axis that splits the heads, K and H alike.
    Returns:
        o_THp float32 (arbitrary at padded tokens), and the states behind this step.
    """

    op = Op("matrix_recurrence", (1, 1, 1, 1, 1, 1, None), (1, 1), mesh, axis)
    return op((q_TKn, k_TKn, v_THp, log_decay, beta_TH), state_SHnp, batch)


def selective_scan(
    x_TD: jax.Array,
    dt_TD: jax.Array,
    A_ND: jax.Array,
    B_TN: jax.Array,
    C_TN: jax.Array,
    state_SND: jax.Array,
    batch: RecurrentBatch,
    *,
    mesh: Mesh | None = None,
    axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mamba-1's recurrence (Gu & Dao 2023, arXiv:2312.00752): S <- exp(dt * A) * S + (dt * x) (x) B; y = S C.

    Args:
        x_TD, dt_TD: inputs and step sizes (already through softplus) of D channels.
        A_ND: decay rates, negative.
        B_TN, C_TN: what is written with and read with, the same for all channels.
        state_SND: of each slot.
        mesh, axis: which devices there are, and the mesh axis that splits the D channels.
    Returns:
        y_TD float32 (arbitrary at padded tokens), and the states behind this step.
    """

    op = Op("selective_scan", (1, 1, 1, None, None, 2, None), (1, 2), mesh, axis)
    return op((x_TD, dt_TD, A_ND, B_TN, C_TN), state_SND, batch)


@dataclasses.dataclass(frozen=True)
class Op:
    """One of these functions, on some devices. Hashable and static.

    Attributes:
        name: of the bodies' function.
        split: of every operand, the state and the batch, which of its axes the mesh axis splits; None for none.
        results: of both results.
        options: what the bodies are given besides.
    """

    name: str
    split: tuple[int | None, ...]
    results: tuple[int, int]
    mesh: Mesh | None
    axis: str | None
    options: tuple[Any, ...] = ()

    def __call__(self, operands: tuple[Any, ...], state: jax.Array, batch: RecurrentBatch) -> tuple[jax.Array, Any]:
        """(outputs, states behind the step); of a tentative batch, the states are a `Held`."""
        if not batch.tentative:
            return self._run(operands, state, batch)
        assert not batch.num_chunk, "a tentative step has decode rows alone"
        rows = jnp.arange(batch.num_decode, dtype=jnp.int32)
        # On copies: bodies change states where they lie.
        out, _ = self._run(
            operands, state[batch.decode_slot_B], dataclasses.replace(batch, decode_slot_B=rows, tentative=False)
        )
        return out, Held(state, operands, self)

    def _run(self, operands: tuple[Any, ...], state: jax.Array, batch: RecurrentBatch) -> tuple[jax.Array, jax.Array]:
        def run(*operands: Any) -> tuple[jax.Array, jax.Array]:
            return _first(self.name, *operands, *self.options)

        return _placed(run, (*operands, state, batch), self.split, self.results, self.mesh, self.axis)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["state", "operands"], meta_fields=["op"])
@dataclasses.dataclass(frozen=True)
class Held:
    """What a tentative step has seen, from which states are made when it is known how far it counts.

    Attributes:
        state: of every slot, before the step; None where it is kept apart.
        operands: of the decode rows' tokens.
    """

    state: jax.Array | None
    operands: tuple[Any, ...]
    op: Op

    def commit(self, state: jax.Array, batch: RecurrentBatch) -> jax.Array:
        """The states behind the tokens that count.

        Args:
            state: those before the step.
            batch: the step's, its `decode_count_B` what counts, and not tentative.
        """
        return self.op(self.operands, state, batch)[1]


def _placed(
    run: Callable[..., tuple[jax.Array, jax.Array]],
    operands: tuple[Any, ...],
    split: Sequence[int | None],
    results: Sequence[int],
    mesh: Mesh | None,
    axis: str | None,
) -> tuple[jax.Array, jax.Array]:
    """Each device on its part: of every operand and result, which of its axes the mesh's splits; None for none."""
    if mesh is None or mesh.size == 1:
        return run(*operands)

    def spec(split: int | None) -> PartitionSpec:
        return PartitionSpec() if split is None or axis is None else PartitionSpec(*(None,) * split, axis)

    return per_device(run, mesh, tuple(map(spec, split)), tuple(map(spec, results)))(*operands)


def _first(name: str, *operands: Any) -> tuple[jax.Array, jax.Array]:
    for module in BACKENDS.values():
        body: Callable[..., tuple[jax.Array, jax.Array]] = getattr(module, name)
        try:
            return body(*operands)
        except NotImplementedError:
            continue
    raise RuntimeError(f"no body computes {name}")
