"""Products with packed int8 weights: one native call does the norm, the rounding, the product and what follows it.

See `ops/native/int8_handlers.cc`. Activations are rotated and rounded to int8 with one scale for every 64 inputs of a row:
finer than `xla.int8`'s one a row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ops import native
from ops.linear.norm import RmsNorm
from ops.linear.weights import PANEL, PackedInt8Weight

# The numbers of `Activation` in int8.h, by the names of ops.activation.
ACTIVATIONS = {"silu": 1, "swish": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3}


def linear(
    x_TI: jax.Array,
    weight: PackedInt8Weight,
    bias_O: jax.Array | None,
    norm: RmsNorm | None,
    residual_TO: jax.Array | None,
) -> jax.Array:
    """y_TO float32."""
    call = jax.ffi.ffi_call(
        native.target("jaxserve_int8_linear"), jax.ShapeDtypeStruct((x_TI.shape[0], weight.shape[0]), jnp.float32)
    )
    return call(
        _f32(x_TI),
        _f32(None if norm is None else norm.scale_I),
        *_operands(weight, bias_O),
        _f32(residual_TO),
        eps=_eps(norm),
        rotated=np.int64(weight.rotated),
    )


def supports_gated(gate_up: PackedInt8Weight, activation: str) -> bool:
    """Whether `gated_mlp` can run: gate and up are whole panels each, and the activation is one it has."""
    return activation in ACTIVATIONS and gate_up.shape[0] % (2 * PANEL) == 0


def gated_mlp(
    x_TD: jax.Array,
    gate_up: PackedInt8Weight,
    down: PackedInt8Weight,
    activation: str,
    gate_up_bias: jax.Array | None,
    down_bias_D: jax.Array | None,
    norm: RmsNorm | None,
    residual_TD: jax.Array | None,
) -> jax.Array:
    """y_TD float32; the hidden values never leave the cache."""
    call = jax.ffi.ffi_call(
        native.target("jaxserve_int8_gated_mlp"), jax.ShapeDtypeStruct((x_TD.shape[0], down.shape[0]), jnp.float32)
    )
    return call(
        _f32(x_TD),
        _f32(None if norm is None else norm.scale_I),
        *_operands(gate_up, gate_up_bias),
        *_operands(down, down_bias_D),
        _f32(residual_TD),
        activation=np.int64(ACTIVATIONS[activation]),
        eps=_eps(norm),
        up_rotated=np.int64(gate_up.rotated),
        down_rotated=np.int64(down.rotated),
    )


def _operands(weight: PackedInt8Weight, bias_O: jax.Array | None) -> tuple[jax.Array, ...]:
    return weight.panels_PQci, weight.scale_O, weight.sums_PGc, _f32(bias_O)


def _f32(array: jax.Array | None) -> jax.Array:
    """An absent operand is an empty array."""
    return jnp.zeros((0,), jnp.float32) if array is None else array.astype(jnp.float32)


def _eps(norm: RmsNorm | None) -> np.float32:
    return np.float32(0.0 if norm is None else norm.eps)
