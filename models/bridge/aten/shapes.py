"""Where numbers stand: shapes, types, and tensors that are made."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from models.bridge.aten.table import DTYPES, OPS, dtype_of, op


@op("view", "_unsafe_view", "reshape")
def _view(x: jax.Array, shape: Any) -> jax.Array:
    if isinstance(shape, str):
        raise NotImplementedError("view as another dtype")
    return x.reshape(shape)


OPS["permute"], OPS["transpose"] = jnp.transpose, jnp.swapaxes
OPS["t"] = lambda x: jnp.swapaxes(x, 0, 1) if x.ndim == 2 else x
OPS["mT"] = lambda x: jnp.swapaxes(x, -1, -2)
OPS["movedim"], OPS["diagonal"] = jnp.moveaxis, jnp.diagonal


@op("unsqueeze")
def _unsqueeze(x: jax.Array, axis: int) -> jax.Array:
    return jnp.expand_dims(x, axis)


@op("squeeze")
def _squeeze(x: jax.Array, axes: Any) -> jax.Array:
    axes = axes if isinstance(axes, tuple) else (axes,)
    return jnp.squeeze(x, tuple(axis for axis in axes if x.shape[axis] == 1))


@op("expand")
def _expand(x: jax.Array, shape: Sequence[int], implicit: bool = False) -> jax.Array:
    lead = len(shape) - x.ndim
    return jnp.broadcast_to(x, tuple(x.shape[i - lead] if size == -1 else size for i, size in enumerate(shape)))


@op("select")
def _select(x: jax.Array, axis: int, index: int) -> jax.Array:
    return jax.lax.index_in_dim(x, index, axis % x.ndim, keepdims=False)


def _slices(x: jax.Array, axis: int, start: Any, end: Any, step: int) -> tuple[slice, ...]:
    return (slice(None),) * (axis % x.ndim) + (slice(start, None if end is None else end, step),)


@op("slice")
def _slice(x: jax.Array, axis: int = 0, start: Any = None, end: Any = None, step: int = 1) -> jax.Array:
    return x[_slices(x, axis, start, end, step)]


@op("slice_scatter")
def _slice_scatter(
    x: jax.Array, source: jax.Array, axis: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> jax.Array:
    return x.at[_slices(x, axis, start, end, step)].set(source.astype(x.dtype))


@op("select_scatter")
def _select_scatter(x: jax.Array, source: jax.Array, axis: int, index: int) -> jax.Array:
    return x.at[(slice(None),) * (axis % x.ndim) + (index,)].set(source.astype(x.dtype))


@op("split", "split_with_sizes")
def _split(x: jax.Array, sizes: Any, axis: int = 0) -> tuple[jax.Array, ...]:
    whole = x.shape[axis]
    sizes = sizes if isinstance(sizes, tuple) else [builtins.min(sizes, whole - at) for at in range(0, whole, sizes)]
    bounds = [builtins.sum(sizes[: index + 1]) for index in range(len(sizes) - 1)]
    return tuple(jnp.split(x, bounds, axis))


@op("chunk")
def _chunk(x: jax.Array, count: int, axis: int = 0) -> tuple[jax.Array, ...]:
    return _split(x, -(-x.shape[axis] // count), axis)


@op("unbind")
def _unbind(x: jax.Array, axis: int = 0) -> tuple[jax.Array, ...]:
    return tuple(jnp.moveaxis(x, axis, 0))


OPS["cat"] = lambda parts, axis=0: jnp.concatenate([p for p in parts if p.shape != (0,)], axis)
OPS["stack"] = lambda parts, axis=0: jnp.stack(parts, axis)


@op("repeat")
def _repeat(x: jax.Array, times: Sequence[int]) -> jax.Array:
    return jnp.tile(x, times)


@op("repeat_interleave.self_int")
def _repeat_interleave(x: jax.Array, times: int, dim: int | None = None, output_size: int | None = None) -> jax.Array:
    return jnp.repeat(x, times, axis=dim)


@op("constant_pad_nd", "pad")
def _pad(x: jax.Array, widths: Sequence[int], value: float = 0) -> jax.Array:
    pairs = [(0, 0)] * (x.ndim - len(widths) // 2) + [tuple(widths[i : i + 2]) for i in range(len(widths) - 2, -1, -2)]
    return jax.lax.pad(x, jnp.asarray(value, x.dtype), [(a, b, 0) for a, b in pairs])


@op("_to_copy", "to", "_to_copy.default")
def to(x: jax.Array, dtype: str | None = None, **_: Any) -> jax.Array:
    return x if dtype is None else x.astype(DTYPES[dtype])


OPS["type_as"] = lambda x, other: x.astype(other.dtype)
OPS["convert_element_type"] = lambda x, dtype: x.astype(DTYPES[dtype])


@op("arange")
def _arange(*bounds: Any, dtype: str | None = None) -> jax.Array:
    floats = any(isinstance(bound, float) for bound in bounds)
    return jnp.arange(*bounds, dtype=(jnp.float32 if floats else jnp.int32) if dtype is None else DTYPES[dtype])


OPS["zeros"] = lambda shape, dtype=None: jnp.zeros(shape, dtype_of(dtype))
OPS["ones"] = lambda shape, dtype=None: jnp.ones(shape, dtype_of(dtype))
OPS["empty"] = OPS["zeros"]
OPS["new_zeros"] = lambda x, shape, dtype=None: jnp.zeros(shape, x.dtype if dtype is None else DTYPES[dtype])
OPS["new_ones"] = lambda x, shape, dtype=None: jnp.ones(shape, x.dtype if dtype is None else DTYPES[dtype])
OPS["new_empty"] = OPS["new_zeros"]
OPS["new_full"] = lambda x, shape, value, dtype=None: jnp.full(
    shape, value, x.dtype if dtype is None else DTYPES[dtype]
)
OPS["zeros_like"] = lambda x, dtype=None: jnp.zeros_like(x, None if dtype is None else DTYPES[dtype])
OPS["ones_like"] = lambda x, dtype=None: jnp.ones_like(x, None if dtype is None else DTYPES[dtype])
OPS["empty_like"] = OPS["zeros_like"]
OPS["full_like"] = lambda x, value, dtype=None: jnp.full_like(x, value, None if dtype is None else DTYPES[dtype])


@op("full", "scalar_tensor")
def _full(*told: Any, dtype: str | None = None) -> jax.Array:
    shape, value = told if len(told) == 2 else ((), told[0])
    made = jnp.bool_ if isinstance(value, bool) else jnp.int32 if isinstance(value, int) else jnp.float32
    return jnp.full(shape, value, made if dtype is None else DTYPES[dtype])


OPS["fill"] = lambda x, value: jnp.broadcast_to(jnp.asarray(value, x.dtype), x.shape)
OPS["copy"] = lambda x, source, non_blocking=False: jnp.broadcast_to(source, x.shape).astype(x.dtype)
