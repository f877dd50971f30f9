"""How a network is put on devices, and parameters that have no value yet."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from models.recipes import Recipes, under
from sharding.rules import DEFAULT_RULES, ShardingRules, num_shards


@dataclasses.dataclass(frozen=True)
class Build:
    """How a network is put on devices; what it computes is `ModelConfig`'s.

    Attributes:
        dtype: of the weights; norm scales and biases are always float32.
        compute_dtype: of activations. float32 on CPU, where a bf16 result costs a pass.
        mesh: None for one device.
        max_model_len: the longest context to serve, tokens.
    """

    dtype: Any = jnp.float32
    compute_dtype: Any = jnp.float32
    mesh: Mesh | None = None
    rules: ShardingRules = DEFAULT_RULES
    max_model_len: int = 2048

    def shards(self, logical: str, count: int) -> int:
        """Into how many pieces `count` things along a logical axis are cut: 1 where they cannot be cut evenly."""
        shards = num_shards(self.mesh, logical, self.rules)
        return shards if count % shards == 0 else 1

    def axis(self, logical: str, count: int) -> str | None:
        """`logical` where its `count` things can be cut evenly, else None: every device has them all."""
        return logical if count % num_shards(self.mesh, logical, self.rules) == 0 else None


class Weight(nnx.Param):
    """A parameter that a loader fills.

    Metadata: `logical_axes` says how it is sharded; `gate_shards`, where there is one, is (axis, S): gate and up are
    interleaved along that axis in S pieces; `spread`, where heads do not divide the mesh, how it is made from the array
    that recipes describe.
    """

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that recipes assemble."""
        spread = self.get_metadata().get("spread")
        return tuple(self.shape) if spread is None else spread.stored_shape(tuple(self.shape))

    def from_stored(self, array: np.ndarray) -> np.ndarray:
        """The parameter's array from the one that recipes assemble."""
        spread = self.get_metadata().get("spread")
        array = array.reshape(self.stored_shape)
        return array if spread is None else spread.apply(array)


def weight(shape: tuple[int, ...], dtype: Any, logical_axes: tuple[str | None, ...], **metadata: Any) -> Weight:
    """A parameter that has no value yet."""
    return Weight(jax.ShapeDtypeStruct(shape, dtype), logical_axes=logical_axes, **metadata)


def child_recipes(module: nnx.Module, children: dict[str, str], name: str) -> Recipes:
    """The recipes of a module's children: attribute -> name below the module's own."""
    recipes: Recipes = {}
    for attribute, child in children.items():
        recipes |= under(attribute, getattr(module, attribute).recipes(f"{name}.{child}" if name else child))
    return recipes
