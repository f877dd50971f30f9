"""The table of operations: a file of this folder puts its own in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

DTYPES: dict[str, Any] = {
    "torch.float32": jnp.float32,
    "torch.float64": jnp.float32,
    "torch.bfloat16": jnp.bfloat16,
    "torch.float16": jnp.float16,
    "torch.int64": jnp.int32,
    "torch.int32": jnp.int32,
    "torch.int16": jnp.int16,
    "torch.int8": jnp.int8,
    "torch.uint8": jnp.uint8,
    "torch.bool": jnp.bool_,
}

OPS: dict[str, Callable[..., Any]] = {}


def op(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Puts a function into the table under torch's names, with or without an overload."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        OPS.update(dict.fromkeys(names, function))
        return function

    return add


def dtype_of(told: str | None) -> Any:
    """The dtype of a tensor that is made; torch's default where nothing is told."""
    return jnp.float32 if told is None else DTYPES[told]
