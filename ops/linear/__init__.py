"""Matrix products with a weight: y = x W^T + b, whatever the weight is stored as.

Weights are `[out, in]`. A weight is a dense array or a quantized pytree (`Int8Weight`); `linear` and `embed` dispatch
on its type, so a model never asks how it is stored.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ops.linear import xla
from ops.linear.weights import SCHEMES, Int8Weight, Weight, quantize

__all__ = ["SCHEMES", "Int8Weight", "Weight", "embed", "linear", "quantize"]


def linear(
    x_TI: jax.Array,
    weight: Weight,
    bias_O: jax.Array | None = None,
    *,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """y_TO = x_TI W_OI^T + bias_O, accumulated in float32.

    Args:
        x_TI: float activations; leading axes before T are allowed. Rounded to a dense weight's dtype for the product;
            with an int8 weight each row is rounded to int8 on CPU. Keep activations float32 on CPU: a bf16 result
            costs a pass there.
        weight: dense [O, I], or quantized.
        bias_O: added in float32.
        out_dtype: dtype of the result; x's when None.
    Raises:
        ValueError: x's last axis is not the weight's I.
    """
    O, I = weight.shape
    if x_TI.shape[-1] != I:
        raise ValueError(f"linear: x has {x_TI.shape[-1]} features, but the weight [{O}, {I}] takes {I}.")
    lead = x_TI.shape[:-1]
    flat_TI = x_TI.reshape(-1, I)
    if isinstance(weight, Int8Weight):
        y_TO = xla.int8(flat_TI, weight)
    else:
        y_TO = xla.dense(flat_TI, weight)
    if bias_O is not None:
        y_TO = y_TO + bias_O.astype(jnp.float32)
    return y_TO.astype(x_TI.dtype if out_dtype is None else out_dtype).reshape(*lead, O)


def embed(weight: Weight, tokens_T: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """x_TD: the table's rows of the given tokens; zeros for ids outside the table.

    Args:
        weight: the embedding table [V, D], dense or quantized (the same object may be the tied output projection).
        tokens_T: int32 ids, any shape.
        dtype: of the result.
    """
    if isinstance(weight, Int8Weight):
        rows_TD = jnp.take(weight.values_OI, tokens_T, axis=0, mode="fill", fill_value=0)
        scale_T = jnp.take(weight.scale_O, tokens_T, axis=0, mode="fill", fill_value=0)
        return (rows_TD.astype(jnp.float32) * scale_T[..., None]).astype(dtype)
    return jnp.take(weight, tokens_T, axis=0, mode="fill", fill_value=0).astype(dtype)
