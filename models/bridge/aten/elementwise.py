"""What is done to every number by itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from models.bridge.aten.table import OPS, dtype_of, op


def _float(x: Any) -> Any:
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)


for _name, _function in {
    "abs": jnp.abs, "neg": jnp.negative, "floor": jnp.floor, "ceil": jnp.ceil, "round": jnp.round, "sign": jnp.sign,
    "isnan": jnp.isnan, "isinf": jnp.isinf, "logical_not": jnp.logical_not, "bitwise_not": jnp.invert,
    "relu": jax.nn.relu, "silu": jax.nn.silu, "mish": jax.nn.mish, "hardswish": jax.nn.hard_swish,
    "hardsigmoid": jax.nn.hard_sigmoid, "maximum": jnp.maximum, "minimum": jnp.minimum, "where": jnp.where,
    "logical_and": jnp.logical_and, "logical_or": jnp.logical_or, "logical_xor": jnp.logical_xor,
    "bitwise_and": jnp.bitwise_and, "bitwise_or": jnp.bitwise_or, "bitwise_xor": jnp.bitwise_xor,
    "__and__": jnp.bitwise_and, "__or__": jnp.bitwise_or, "atan2": jnp.arctan2, "remainder": jnp.remainder, "fmod": jnp.fmod,
    "eq": jnp.equal, "ne": jnp.not_equal, "lt": jnp.less, "le": jnp.less_equal, "gt": jnp.greater, "ge": jnp.greater_equal,
    "floor_divide": jnp.floor_divide, "mul": jnp.multiply, "bmm": jnp.matmul, "mm": jnp.matmul, "matmul": jnp.matmul,
    "dot": jnp.dot, "mv": jnp.matmul, "outer": jnp.outer, "addcmul": lambda x, a, b, value=1: x + value * a * b,
    "flip": jnp.flip, "roll": lambda x, shifts, axes=(): jnp.roll(x, shifts, axes or None),
    "tril": lambda x, diagonal=0: jnp.tril(x, diagonal), "triu": lambda x, diagonal=0: jnp.triu(x, diagonal),
    "eye": lambda n, m=None, dtype=None: jnp.eye(n, m, dtype=dtype_of(dtype)), "square": jnp.square, "trunc": jnp.trunc,
}.items():  # fmt: skip
    OPS[_name] = _function

for _name, _function in {
    "exp": jnp.exp, "expm1": jnp.expm1, "exp2": jnp.exp2, "log": jnp.log, "log1p": jnp.log1p, "log2": jnp.log2,
    "sqrt": jnp.sqrt, "rsqrt": jax.lax.rsqrt, "reciprocal": jnp.reciprocal, "sin": jnp.sin, "cos": jnp.cos, "tan": jnp.tan,
    "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid, "erf": jax.lax.erf, "log_sigmoid": jax.nn.log_sigmoid,
}.items():  # fmt: skip
    OPS[_name] = lambda x, _of=_function: _of(_float(x))

for _name in (
    "clone",
    "contiguous",
    "detach",
    "alias",
    "lift_fresh",
    "lift_fresh_copy",
    "dropout",
    "view_as_real_copy",
):
    OPS[_name] = lambda x, *_, **__: x


@op("log_sigmoid_forward")
def _log_sigmoid(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.nn.log_sigmoid(x), x


@op("add")
def _add(a: Any, b: Any, alpha: float = 1) -> jax.Array:
    return jnp.add(a, b if alpha == 1 else b * alpha)


@op("sub")
def _sub(a: Any, b: Any, alpha: float = 1) -> jax.Array:
    return jnp.subtract(a, b if alpha == 1 else b * alpha)


@op("rsub")
def _rsub(a: Any, b: Any, alpha: float = 1) -> jax.Array:
    return jnp.subtract(b, a if alpha == 1 else a * alpha)


@op("div")
def _div(a: Any, b: Any, rounding_mode: str | None = None) -> jax.Array:
    if rounding_mode is None:
        return jnp.true_divide(a, b)
    return (
        jnp.floor_divide(a, b)
        if rounding_mode == "floor"
        else jnp.trunc(jnp.true_divide(a, b)).astype(jnp.result_type(a, b))
    )


@op("pow")
def _pow(a: Any, b: Any) -> jax.Array:
    return jnp.square(a) if isinstance(b, int | float) and b == 2 else jnp.power(a, b)


@op("clamp", "clip")
def _clamp(x: jax.Array, min: Any = None, max: Any = None) -> jax.Array:
    return jnp.clip(x, min, max)


OPS["clamp_min"], OPS["clamp_max"] = jnp.maximum, jnp.minimum
OPS["hardtanh"] = lambda x, min_val=-1.0, max_val=1.0: jnp.clip(x, min_val, max_val)
OPS["leaky_relu"] = lambda x, negative_slope=0.01: jax.nn.leaky_relu(x, negative_slope)
OPS["elu"] = lambda x, alpha=1.0, scale=1, input_scale=1: scale * jax.nn.elu(x * input_scale, alpha)
OPS["gelu"] = lambda x, approximate="none": jax.nn.gelu(x, approximate=approximate == "tanh")


@op("softplus")
def _softplus(x: jax.Array, beta: float = 1, threshold: float = 20) -> jax.Array:
    return jnp.where(x * beta > threshold, x, jax.nn.softplus(x * beta) / beta)
