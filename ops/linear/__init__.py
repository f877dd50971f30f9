"""Products with a weight, y = x W^T + b, whatever the weight is stored as, and the blocks made of them.

Weights are `[out, in]`. A weight is a dense array or a quantized pytree that knows how it is multiplied (see weights/), so a
model never asks how it is stored. What stands around a product (a norm before it, a residual after it) may be given
with it: a kernel that can takes it along, otherwise it is computed around the product.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ops.activation import activation as named
from ops.activation import gated
from ops.linear.weights import (
    SCHEMES,
    Around,
    Int8Weight,
    PackedInt8Weight,
    StoredWeight,
    Weight,
    pack,
    quantize,
    stored,
)
from ops.lora import Adapters, add_lora
from ops.norm import CentredNorm, RmsNorm, TakenNorm

__all__ = [
    "SCHEMES",
    "CentredNorm",
    "Int8Weight",
    "PackedInt8Weight",
    "RmsNorm",
    "StoredWeight",
    "TakenNorm",
    "Weight",
    "embed",
    "gated_mlp",
    "linear",
    "mlp",
    "pack",
    "quantize",
]


def linear(
    x_TI: jax.Array,
    weight: Weight,
    bias_O: jax.Array | None = None,
    *,
    norm: TakenNorm | None = None,
    residual_TO: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    adapters: Adapters | None = None,
    activation: str | None = None,
) -> jax.Array:
    """y_TO = act(norm(x_TI) W_OI^T + bias_O) + residual_TO, accumulated in float32.

    Args:
        x_TI: float activations; leading axes before T are allowed. Rounded to a dense weight's dtype for the product;
            with an int8 weight each row is rounded to int8 on CPU. Keep activations float32 on CPU: a bf16 result
            costs a pass there.
        weight: dense [O, I], or quantized.
        bias_O: added in float32.
        norm: applied to x first.
        residual_TO: added to the result, in the result's dtype.
        out_dtype: dtype of the result; x's when None.
        adapters: change the product, each row's own; see `ops.lora.add_lora`.
        activation: a name that `ops.activation` knows; None for none.
    Raises:
        ValueError: x's last axis is not the weight's I, or the activation is not known.
    """
    O, I = weight.shape
    if x_TI.shape[-1] != I:
        raise ValueError(f"linear: x has {x_TI.shape[-1]} features, but the weight [{O}, {I}] takes {I}.")
    lead, dtype = x_TI.shape[:-1], x_TI.dtype if out_dtype is None else out_dtype
    kept = stored(weight)
    if activation is not None and (adapters is not None or not kept.activates(activation)):
        y_TO = linear(x_TI, weight, bias_O, norm=norm, out_dtype=out_dtype, adapters=adapters)
        y_TO = named(activation)(y_TO)
        return y_TO if residual_TO is None else residual_TO.astype(dtype) + y_TO
    if isinstance(norm, CentredNorm) and (adapters is not None or not kept.centres):
        x_TI, norm = norm(x_TI), None
    flat_TI = x_TI.reshape(-1, I)
    around = Around(bias_O, norm, None if residual_TO is None else residual_TO.reshape(-1, O), activation=activation)
    if adapters is None:
        y_TO = kept.linear(flat_TI, around, dtype)
    elif kept.takes(adapters.stack):
        y_TO = kept.linear(flat_TI, dataclasses.replace(around, adapters=adapters), dtype)
    else:
        assert not isinstance(norm, CentredNorm)
        y_TO = add_lora(kept.linear(flat_TI, around, dtype), flat_TI, adapters, norm)
    return y_TO.reshape(*lead, O)


def mlp(
    x_TD: jax.Array,
    up: Weight,
    down: Weight,
    activation: str,
    *,
    up_bias_F: jax.Array | None = None,
    down_bias_D: jax.Array | None = None,
    norm: TakenNorm | None = None,
    residual_TD: jax.Array | None = None,
    adapters: tuple[Adapters | None, Adapters | None] = (None, None),
) -> jax.Array:
    """down(act(up(norm(x)))) + residual, in x's dtype.

    Args:
        x_TD: float activations; leading axes before T are allowed.
        up, down: [F, D] and [D, F].
        activation: a name that `ops.activation` knows.
        norm: applied to x first.
        residual_TD: added to the result.
        adapters: of up and of down.
    Raises:
        ValueError: the activation is not known.
    """
    first = stored(up)
    if adapters == (None, None) and (first.centres or not isinstance(norm, CentredNorm)):
        rest_TD = None if residual_TD is None else residual_TD.reshape(-1, residual_TD.shape[-1])
        around = Around(up_bias_F, norm, rest_TD)
        y_TD = first.mlp(x_TD.reshape(-1, x_TD.shape[-1]), stored(down), activation, around, down_bias_D)
        if y_TD is not None:
            return y_TD.astype(x_TD.dtype).reshape(*x_TD.shape[:-1], -1)
    hidden_TF = linear(x_TD, up, up_bias_F, norm=norm, adapters=adapters[0], activation=activation)
    return linear(hidden_TF, down, down_bias_D, residual_TO=residual_TD, adapters=adapters[1])


def gated_mlp(
    x_TD: jax.Array,
    gate_up: Weight,
    down: Weight,
    activation: str,
    *,
    gate_up_bias: jax.Array | None = None,
    down_bias_D: jax.Array | None = None,
    norm: TakenNorm | None = None,
    residual_TD: jax.Array | None = None,
    shards: int = 1,
    adapters: tuple[Adapters | None, Adapters | None] = (None, None),
) -> jax.Array:
    """down(act(gate(norm(x))) * up(norm(x))) + residual (Shazeer 2020, arXiv:2002.05202), in x's dtype.

    Args:
        x_TD: float activations.
        gate_up: [2 F, D]; rows are [shards, 2, F / shards]: each shard's part of the gate, then the same part of up.
        down: [D, F].
        activation: a name that `ops.activation` knows.
        gate_up_bias, down_bias_D: [2 F] in the rows' order, and [D].
        norm: applied to x first.
        residual_TD: added to the result.
        adapters: of gate_up and of down; what they add to gate and up goes through the activation.
    Raises:
        ValueError: the activation is not known.
    """
    if isinstance(norm, CentredNorm):
        x_TD, norm = norm(x_TD), None
    if shards == 1:
        around = Around(gate_up_bias, norm, residual_TD, adapters[0])
        y_TD = stored(gate_up).gated_mlp(x_TD, stored(down), activation, around, down_bias_D, adapters[1])
        if y_TD is not None:
            return y_TD.astype(x_TD.dtype)
    hidden_TF = gated(linear(x_TD, gate_up, gate_up_bias, norm=norm, adapters=adapters[0]), activation, shards)
    return linear(hidden_TF, down, down_bias_D, residual_TO=residual_TD, adapters=adapters[1])


def embed(weight: Weight, tokens_T: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """x_TD: the table's rows of the given tokens; zeros for ids outside the table.

    Args:
        weight: the embedding table [V, D], dense or quantized (the same object may be the tied output projection).
        tokens_T: int32 ids, any shape.
        dtype: of the result.
    """
    return stored(weight).rows(tokens_T).astype(dtype)
