"""Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464) between its projections: convolution, gates, recurrence, norm, gate."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ops.norm import rms_norm
from ops.recurrent import matrix_recurrence, native, short_conv
from ops.recurrent.batch import RecurrentBatch

UNIT_EPS = 1e-6  # under the root of q's and k's norms, as in recurrent.h; no checkpoint says another


class DeltaWeights(NamedTuple):
    """What a layer has of its own besides projections, all float32.

    Attributes:
        kernel_WC: taps of the convolution over q, k and v, the newest token's last.
        rate_H: -exp(A_log): how fast each head's state decays.
        dt_bias_H: added to the decay's step.
        gain_p: of the norm over a head's result.
        eps: under that norm's root; static.
        reach: how far v may replace what k reads: 1, or 2, where it may turn it over (Grazzi et al. 2024, arXiv:2411.12537).
            Static.
        activation: behind the convolution, by the names of `ops.activation`; static.
    """

    kernel_WC: jax.Array
    rate_H: jax.Array
    dt_bias_H: jax.Array
    gain_p: jax.Array
    eps: float
    reach: float
    activation: str = "silu"


def gated_delta(
    x_TX: jax.Array,
    gates_TJ: jax.Array,
    weights: DeltaWeights,
    conv_SwC: jax.Array,
    matrix_SHnp: jax.Array,
    batch: RecurrentBatch,
    *,
    key_heads: int,
    mesh: Mesh | None = None,
    axis: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The layer between its projections: one kernel where there is one for it, else its parts.

    Args:
        x_TX: projected q, k, v and z, laid out by key head: its q and its k (n each), then v and z of the G value heads that
            read it (p each).
        gates_TJ: projected gates [T, key_heads, 2, G], flat: how far v replaces what k reads, how fast the state decays.
        conv_SwC: of each slot the last w inputs of the convolution, channels by key head.
        matrix_SHnp: of each slot.
        key_heads: K, static; H is a multiple of it.
        mesh, axis: which devices there are, and the mesh axis that splits the heads.
    Returns:
        out_TO, O = H p, in x's dtype: norm(o) * silu(z), what the last projection takes (arbitrary at padded tokens); and both
        states behind this step, of a tentative batch as `Held`.
    """
    *own, eps, reach, activation = weights
    if (mesh is None or mesh.size == 1) and not batch.tentative and activation in ("silu", "swish"):
        try:
            how: dict[str, Any] = {"key_heads": key_heads, "eps": eps, "reach": reach}
            out_TO, conv, matrix = native.gated_delta(x_TX, gates_TJ, own, conv_SwC, matrix_SHnp, batch, **how)
            return out_TO.astype(x_TX.dtype), conv, matrix
        except NotImplementedError:
            pass
    T, (_, H, n, p), K = x_TX.shape[0], matrix_SHnp.shape, key_heads
    width = 2 * n + H // K * p  # of q, k and v of a key head
    x_TKc, gates_TK2G = x_TX.reshape(T, K, -1), gates_TJ.reshape(T, K, 2, -1)
    mixed_TC, conv = short_conv(
        x_TKc[:, :, :width].reshape(T, -1),
        weights.kernel_WC,
        None,
        conv_SwC,
        batch,
        activation=activation,
        mesh=mesh,
        axis=axis,
    )
    q_TKn, k_TKn, v_TKc = jnp.split(mixed_TC.reshape(T, K, width), [n, 2 * n], axis=-1)
    out_THp, matrix = matrix_recurrence(
        unit(q_TKn) * n**-0.5,
        unit(k_TKn),
        v_TKc.reshape(T, H, p),
        weights.rate_H * jax.nn.softplus(gates_TK2G[:, :, 1].reshape(T, H) + weights.dt_bias_H),
        weights.reach * jax.nn.sigmoid(gates_TK2G[:, :, 0].reshape(T, H)),
        matrix_SHnp,
        batch,
        mesh=mesh,
        axis=axis,
    )
    z_THp = x_TKc[:, :, width:].reshape(T, H, p).astype(jnp.float32)
    out_THp = rms_norm(out_THp, weights.gain_p, weights.eps) * jax.nn.silu(z_THp)
    return out_THp.reshape(T, H * p).astype(x_TX.dtype), conv, matrix


def unit(x_TKn: jax.Array) -> jax.Array:
    """x over its length, head by head."""
    return x_TKn * jax.lax.rsqrt(jnp.sum(x_TKn * x_TKn, axis=-1, keepdims=True) + UNIT_EPS)
