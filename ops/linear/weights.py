"""What a weight may be: a dense array, or a quantized one that remembers how to become dense."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

INT8_MAX = 127.0


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values_OI", "scale_O"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Int8Weight:
    """A weight matrix in symmetric int8 with one float32 scale an output channel: w = values * scale.

    Attributes:
        values_OI: int8, -127..127.
        scale_O: float32, > 0.
    """

    values_OI: jax.Array
    scale_O: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I), as of the dense weight."""
        return self.values_OI.shape  # pyright: ignore[reportReturnType]

    @property
    def dtype(self) -> jnp.dtype:
        """int8: how the weight is stored."""
        return self.values_OI.dtype

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """The dense weight_OI that the quantized one stands for."""
        return (self.values_OI.astype(jnp.float32) * self.scale_O[:, None]).astype(dtype)


Weight = jax.Array | Int8Weight
SCHEMES = ("int8",)


def quantize(weight_OI: jax.Array, scheme: str | None) -> Weight:
    """Converts a dense weight to the type that `scheme` names.

    Args:
        weight_OI: float array.
        scheme: None keeps it dense; "int8" is symmetric int8 with one scale an output channel.
    Raises:
        ValueError: the scheme is not known.
    """
    if scheme is None:
        return weight_OI
    if scheme == "int8":
        return _int8(weight_OI)
    raise ValueError(f"Quantization {scheme!r} is not supported; known ones are {', '.join(SCHEMES)}.")


@jax.jit
def _int8(weight_OI: jax.Array) -> Int8Weight:
    values_OI, scale_O = quantize_rows(weight_OI)
    return Int8Weight(values_OI, scale_O)


def quantize_rows(x_TI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Symmetric int8 with one scale a row: (values_TI int8, scale_T float32 > 0), x ~ values * scale."""
    x_TI = x_TI.astype(jnp.float32)
    peak_T = jnp.max(jnp.abs(x_TI), axis=-1)
    # A row of zeros gets scale 1; a denormal peak would overflow the division below.
    scale_T = jnp.where(peak_T > 1e-30, peak_T / INT8_MAX, 1.0)
    values_TI = jnp.round(x_TI / scale_T[..., None])
    return jnp.clip(values_TI, -INT8_MAX, INT8_MAX).astype(jnp.int8), scale_T
