"""Room for adapters in a network: beside each weight that they may change, a stack of matrices with a place a slot.

The stacks are variables of the modules whose products they change, apart from the weights, so that a network's own leaves are
what they were and a step in which nobody has an adapter runs the program that it ran before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from models.adapters.adapter import Adapter
from models.adapters.fit import Site, fit
from models.layers.build import Weight
from models.layers.linear import AdapterStack, Linear
from models.parameters import quantizable
from ops.lora import LoraStack
from sharding.rules import DEFAULT_RULES, ShardingRules, to_sharding


@dataclasses.dataclass(frozen=True)
class Room:
    """Where a model takes adapters.

    Attributes:
        sites: weights that they may change, in the order in which matrices are packed.
        slots: adapters at once; slot 0, nobody's, comes on top.
        max_rank: of an adapter.
    """

    sites: tuple[Site, ...]
    slots: int
    max_rank: int
    spreads: Mapping[str, Callable[[np.ndarray], np.ndarray]]
    shapes: Mapping[str, tuple[int, int]]

    def pack(self, adapter: Adapter) -> np.ndarray:
        """All matrices in one float32 array: of each site A [R, I], then B turned [R, O]; zeros where there are none.

        Raises:
            ValueError: it does not fit this model, in a sentence.
        """
        fitted = fit(adapter, self.sites, self.max_rank)
        parts = []
        for site in self.sites:
            R, (outputs, inputs) = site.rank(self.max_rank), self.shapes[site.path]
            if site.path not in fitted:
                parts.append(np.zeros(R * (outputs + inputs), np.float32))
                continue
            a_RI, b_OR = fitted[site.path]
            spread = self.spreads.get(site.path)
            if (
                spread is not None
            ):  # heads that do not divide the mesh: rows of B, or columns of A, are repeated and padded
                if b_OR.shape[0] != outputs:
                    b_OR = spread(b_OR)
                if a_RI.shape[1] != inputs:
                    a_RI = spread(a_RI)
            parts += [a_RI.reshape(-1), np.ascontiguousarray(b_OR.T).reshape(-1)]
        return np.concatenate(parts)

    def unpack(self, packed: jax.Array) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Of each site (A [R, I], B [R, O]), inside a program."""
        at = 0
        for site in self.sites:
            R, (outputs, inputs) = site.rank(self.max_rank), self.shapes[site.path]
            a = jax.lax.slice(packed, (at,), (at + R * inputs,)).reshape(R, inputs)
            at += R * inputs
            b = jax.lax.slice(packed, (at,), (at + R * outputs,)).reshape(R, outputs)
            at += R * outputs
            yield a, b

    @property
    def size(self) -> int:
        """Numbers of a packed adapter."""
        return sum(site.rank(self.max_rank) * sum(self.shapes[site.path]) for site in self.sites)


def attach(model: Any, slots: int, max_rank: int, mesh: Mesh | None, rules: ShardingRules = DEFAULT_RULES) -> Room:
    """Gives a loaded network room for `slots` adapters of rank `max_rank` at most, on its devices.

    Every `Linear` whose weight moves rows of the checkpoint's tensors and nothing else gets a stack.
    """
    recipes = model.recipes()
    linears = {
        ".".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)
    }
    sites, spreads, shapes = [], {}, {}
    for path in sorted(path.removesuffix(".weight") for path in quantizable(model)):
        module = linears.get(path)
        recipe = recipes.get(f"{path}.weight")
        if module is None or recipe is None or not recipe.by_rows or path == "head":
            continue
        weight = module.weight
        outputs, inputs = _placed_shape(weight)
        stored = weight.stored_shape
        site = Site(path, recipe, tuple(piece.name for piece in recipe.pieces), stored[0], stored[-1])
        spread = weight.get_metadata().get("spread")
        if spread is not None:
            spreads[path] = spread.apply
        axes = weight.get_metadata()["logical_axes"]
        R = site.rank(max_rank)
        a = _zeros((slots + 1, R, inputs), (None, None, axes[1]), mesh, rules)
        b = _zeros((slots + 1, R, outputs), (None, None, axes[0]), mesh, rules)
        single = mesh is None or mesh.size == 1
        module.lora = nnx.data(AdapterStack(LoraStack(a, b, native=single and jax.default_backend() == "cpu")))
        sites.append(site)
        shapes[path] = (outputs, inputs)
    return Room(tuple(sites), slots, max_rank, spreads, shapes)


def _placed_shape(weight: Weight) -> tuple[int, int]:
    shape = weight.get_value().shape
    return int(shape[0]), int(shape[1])


def _zeros(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh | None, rules: ShardingRules) -> jax.Array:
    if mesh is None:
        return jnp.zeros(shape, jnp.float32)
    return jax.device_put(np.zeros(shape, np.float32), to_sharding(mesh, axes, rules))
