"""Sums, and numbers that are chosen by others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from models.bridge.aten.shapes import to
from models.bridge.aten.table import DTYPES, OPS, op


def _reduced(function: Callable[..., Any]) -> Callable[..., Any]:
    def reduce(x: Any, axes: Any = None, keepdim: bool = False, dtype: str | None = None) -> jax.Array:
        x = x if dtype is None else x.astype(DTYPES[dtype])
        return function(x, axis=_axes(axes), keepdims=keepdim)

    return reduce


def _axes(axes: Any) -> Any:
    return None if axes is None or axes == () else axes


for _name, _function in {
    "sum": jnp.sum, "mean": jnp.mean, "amax": jnp.max, "amin": jnp.min, "any": jnp.any, "all": jnp.all, "prod": jnp.prod,
    "logsumexp": jax.nn.logsumexp, "argmax": jnp.argmax, "argmin": jnp.argmin, "max": jnp.max, "min": jnp.min,
}.items():  # fmt: skip
    OPS[_name] = _reduced(_function)


@op("max.dim")
def _max(x: jax.Array, axis: int, keepdim: bool = False) -> tuple[jax.Array, jax.Array]:
    return jnp.max(x, axis, keepdims=keepdim), jnp.argmax(x, axis, keepdims=keepdim).astype(jnp.int32)


@op("min.dim")
def _min(x: jax.Array, axis: int, keepdim: bool = False) -> tuple[jax.Array, jax.Array]:
    return jnp.min(x, axis, keepdims=keepdim), jnp.argmin(x, axis, keepdims=keepdim).astype(jnp.int32)


OPS["max.other"], OPS["min.other"] = jnp.maximum, jnp.minimum


@op("var")
def _var(x: jax.Array, axes: Any = None, *, correction: float = 1, unbiased: bool | None = None, keepdim: bool = False):
    ddof = correction if unbiased is None else int(unbiased)
    return jnp.var(x, _axes(axes if not isinstance(axes, bool) else None), ddof=int(ddof), keepdims=keepdim)


OPS["std"] = lambda *args, **told: jnp.sqrt(_var(*args, **told))


@op("linalg_vector_norm", "norm")
def _norm(
    x: jax.Array, order: float = 2, axes: Any = None, keepdim: bool = False, dtype: str | None = None
) -> jax.Array:
    if order != 2:
        raise NotImplementedError(f"a norm of order {order}")
    return jnp.sqrt(jnp.sum(jnp.square(to(x, dtype)), _axes(axes), keepdims=keepdim))


@op("cumsum")
def _cumsum(x: jax.Array, axis: int, dtype: str | None = None) -> jax.Array:
    x = to(x, dtype)
    return jnp.cumsum(x.astype(jnp.int32) if x.dtype == jnp.bool_ else x, axis)


@op("_softmax", "softmax")
def _softmax(x: jax.Array, axis: int, half_to_float: Any = False, dtype: str | None = None) -> jax.Array:
    told = half_to_float if isinstance(half_to_float, str) else dtype
    return jax.nn.softmax(to(x, told), axis)


@op("_log_softmax", "log_softmax")
def _log_softmax(x: jax.Array, axis: int, half_to_float: Any = False, dtype: str | None = None) -> jax.Array:
    told = half_to_float if isinstance(half_to_float, str) else dtype
    return jax.nn.log_softmax(to(x, told), axis)


@op("embedding")
def _embedding(table: jax.Array, ids: jax.Array, *_: Any) -> jax.Array:
    return jnp.take(table, ids, axis=0, mode="clip")


@op("index")
def _index(x: jax.Array, places: Sequence[Any]) -> jax.Array:
    if any(place is not None and place.dtype == jnp.bool_ for place in places):
        raise NotImplementedError("values chosen by truth")
    return x[tuple(slice(None) if place is None else place for place in places)]


@op("index_put", "_unsafe_index_put")
def _index_put(x: jax.Array, places: Sequence[Any], values: jax.Array, accumulate: bool = False) -> jax.Array:
    chosen: tuple[Any, ...] = tuple(slice(None) if place is None else place for place in places)
    if len(chosen) == 1 and getattr(chosen[0], "dtype", None) == jnp.bool_ and values.ndim == 0:
        mask = chosen[0].reshape(chosen[0].shape + (1,) * (x.ndim - chosen[0].ndim))
        return jnp.where(mask, values.astype(x.dtype), x)
    return x.at[chosen].add(values.astype(x.dtype)) if accumulate else x.at[chosen].set(values.astype(x.dtype))


OPS["index_select"] = lambda x, axis, places: jnp.take(x, places, axis)


@op("gather")
def _gather(x: jax.Array, axis: int, places: jax.Array, sparse_grad: bool = False) -> jax.Array:
    axis = axis % x.ndim
    kept = tuple(slice(None) if one == axis else slice(size) for one, size in enumerate(places.shape))
    return jnp.take_along_axis(x[kept], places, axis)


def _at(x: jax.Array, axis: int, places: jax.Array) -> tuple[jax.Array, ...]:
    grid = list(jnp.indices(places.shape, sparse=True))
    grid[axis % x.ndim] = places
    return tuple(grid)


@op("scatter")
def _scatter(x: jax.Array, axis: int, places: jax.Array, values: Any) -> jax.Array:
    values = values if isinstance(values, int | float | bool) else values[tuple(slice(size) for size in places.shape)]
    return x.at[_at(x, axis, places)].set(jnp.asarray(values, x.dtype))


@op("scatter_add")
def _scatter_add(x: jax.Array, axis: int, places: jax.Array, values: jax.Array) -> jax.Array:
    return x.at[_at(x, axis, places)].add(values[tuple(slice(size) for size in places.shape)].astype(x.dtype))


@op("masked_fill")
def _masked_fill(x: jax.Array, mask: jax.Array, value: Any) -> jax.Array:
    return jnp.where(mask, jnp.asarray(value, x.dtype), x)


@op("topk")
def _topk(
    x: jax.Array, count: int, axis: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[jax.Array, jax.Array]:
    last = jnp.moveaxis(x if largest else -x, axis, -1)
    values, places = jax.lax.top_k(last, count)
    values = values if largest else -values
    return jnp.moveaxis(values, -1, axis), jnp.moveaxis(places, -1, axis).astype(jnp.int32)


@op("sort")
def _sort(x: jax.Array, *told: Any, dim: int = -1, descending: bool = False, stable: bool = False) -> tuple[Any, Any]:
    rest = [one for one in told if not isinstance(one, bool)]
    flags = [one for one in told if isinstance(one, bool)]
    axis, down = (rest[0] if rest else dim), (flags[-1] if flags else descending)
    places = jnp.argsort(-x if down else x, axis).astype(jnp.int32)
    return jnp.take_along_axis(x, places, axis), places


OPS["argsort"] = lambda x, *told, **named: _sort(x, *told, **named)[1]
OPS["one_hot"] = lambda ids, count: jax.nn.one_hot(ids, count, dtype=jnp.int32)
