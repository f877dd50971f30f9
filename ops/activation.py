"""Elementwise activations by the names checkpoints use."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

_gelu = functools.partial(jax.nn.gelu, approximate=False)
_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_10": lambda x: jnp.clip(_gelu(x), -10.0, 10.0),
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "hardswish": jax.nn.hard_swish,
    # Ma et al. 2022, "Mega", arXiv:2209.10655: a normal distribution's integral whose slope is relu2's.
    "laplace": lambda x: 0.5 * (1.0 + jax.lax.erf((x - 0.707107) / (0.282095 * 2.0**0.5))),
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "tanh": jnp.tanh,
}
"""By the names that transformers uses. Of those it has, "prelu" and "xielu" are missing: they have weights of their own."""


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function a checkpoint's `hidden_act` names.

    Raises:
        ValueError: the name is not known; the message lists those that are.
    """
    try:
        return ACTIVATIONS[name]
    except KeyError:
        known = ", ".join(sorted(ACTIVATIONS))
        raise ValueError(f"Activation {name!r} is not supported; known ones are {known}.") from None


def gated(hidden_T2F: jax.Array, name: str, shards: int = 1) -> jax.Array:
    """hidden_TF = act(gate) * up (Shazeer 2020, arXiv:2002.05202).

    Args:
        hidden_T2F: [T, 2 F], columns [shards, 2, F / shards]: each shard's part of the gate, then the same part of up.
        name: of the activation.
    Raises:
        ValueError: the activation is not known.
    """
    T, F = hidden_T2F.shape[0], hidden_T2F.shape[1] // 2
    gate, up = jnp.split(
        hidden_T2F.reshape(T, shards, 2, -1), 2, axis=2
    )  # whose gradient is laid side by side, not added up
    return (activation(name)(gate) * up).reshape(T, F)
