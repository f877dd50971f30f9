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

from models.adapters.adapter import Adapter, Base
from models.adapters.fit import Given, Site, fit
from models.adapters.fit_experts import ExpertSite
from models.layers.embedding import Embedding
from models.layers.linear import AdapterStack, Linear
from models.layers.moe import Experts
from models.loading.files.experts import expert_of
from models.parameters import quantizable
from models.recipes import Piece
from ops.lora import LoraStack
from sharding.rules import DEFAULT_RULES, ShardingRules, to_sharding

TIED_HEAD = "lm_head.weight"
"""What adapters call the output projection of a model whose checkpoint has none of its own."""


@dataclasses.dataclass(frozen=True)
class Room:
    """Where a model takes adapters.

    Attributes:
        sites: weights that they may change, in the order in which matrices are packed.
        slots: adapters at once; slot 0, nobody's, comes on top.
        max_rank: of an adapter.
        spreads: by place, how rows or columns are repeated and padded where heads do not divide the mesh.
        shapes: by place, (O, I) as they lie on the devices.
        late: places whose change is made behind the forward pass, where logits are.
        base: what readers of adapters have to know.
        hint: what to do where an adapter changes weights that take none; "" for nothing.
    """

    sites: tuple[Site, ...]
    slots: int
    max_rank: int
    spreads: Mapping[str, Callable[[np.ndarray], np.ndarray]]
    shapes: Mapping[str, tuple[int, int]]
    late: frozenset[str]
    base: Base
    hint: str = ""

    def is_late(self, adapter: Adapter) -> bool:
        """Whether an adapter of this model changes logits directly."""
        given = Given.of(adapter, self.max_rank)
        return any(site.take(given) is not None for site in self.sites if site.place in self.late)

    def pack(self, adapter: Adapter) -> np.ndarray:
        """All matrices in one float32 array: of each site A [R, I], then B turned [R, O]; zeros where there are none.

        Raises:
            ValueError: it does not fit this model, in a sentence.
        """
        fitted = fit(adapter, self.sites, self.max_rank, self.hint)
        parts = []
        for site in self.sites:
            R, (outputs, inputs) = site.rank(self.max_rank), self.shapes[site.place]
            if site.place not in fitted:
                parts.append(np.zeros(R * (outputs + inputs), np.float32))
                continue
            a_RI, b_OR = fitted[site.place].a_RI, fitted[site.place].b_OR
            spread = self.spreads.get(site.place)
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
            R, (outputs, inputs) = site.rank(self.max_rank), self.shapes[site.place]
            a = jax.lax.slice(packed, (at,), (at + R * inputs,)).reshape(R, inputs)
            at += R * inputs
            b = jax.lax.slice(packed, (at,), (at + R * outputs,)).reshape(R, outputs)
            at += R * outputs
            yield a, b

    @property
    def size(self) -> int:
        """Numbers of a packed adapter."""
        return sum(site.rank(self.max_rank) * sum(self.shapes[site.place]) for site in self.sites)


def attach(model: Any, slots: int, max_rank: int, mesh: Mesh | None, rules: ShardingRules = DEFAULT_RULES) -> Room:
    """Gives a loaded network room for `slots` adapters of rank `max_rank` at most, on its devices.

    Every `Linear` whose weight moves rows of the checkpoint's tensors and nothing else gets a stack, the experts of mixtures and
    the token table too, and a tied table another one for the logits.
    """
    making = _Making(model, slots, max_rank, mesh, rules)
    quantized = {path.removesuffix(".weight") for path in quantizable(model)}
    for path, module in sorted((".".join(map(str, path)), module) for path, module in nnx.iter_modules(model)):
        if isinstance(module, Linear) and path in quantized:
            making.linear(path, module)
        elif isinstance(module, Embedding):
            making.table(path, module)
        elif isinstance(module, Experts):
            making.experts(path, module)
    return making.room()


class _Making:
    """A room as its sites are found."""

    def __init__(self, model: Any, slots: int, max_rank: int, mesh: Mesh | None, rules: ShardingRules) -> None:
        self._model, self._slots, self._max_rank = model, slots, max_rank
        self._mesh, self._rules = mesh, rules
        self._recipes = model.recipes()
        self._native = (mesh is None or mesh.size == 1) and jax.default_backend() == "cpu"
        self._dtype = jnp.float32 if model.compute_dtype == jnp.float32 else jnp.bfloat16
        self._tied = getattr(model, "head", None) is None
        self._sites: list[Site] = []
        self._spreads: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._hint = ""

    def linear(self, path: str, module: Linear) -> None:
        """Room beside a product."""
        recipe, weight = self._recipes.get(f"{path}.weight"), module.weight
        if recipe is None or not recipe.by_rows:
            return
        stored = weight.stored_shape
        site = Site(path, recipe, tuple(piece.name for piece in recipe.pieces), stored[0], stored[-1])
        spread = weight.get_metadata().get("spread")
        if spread is not None:
            self._spreads[site.place] = spread.apply
        outputs, inputs = weight.get_value().shape
        out_axis, in_axis = weight.get_metadata()["logical_axes"]
        module.lora = self._stack(site, outputs, inputs, (None, in_axis), (None, out_axis))

    def table(self, path: str, module: Embedding) -> None:
        """Room for the rows of a token table, and beside the logits that a tied one makes."""
        recipe = self._recipes.get(f"{path}.weight")
        if not isinstance(recipe, Piece):
            return
        rows, width = module.weight.get_value().shape
        table = Site(path, recipe, (recipe.name,), width, rows, rows=True)
        module.lora = self._stack(table, width, rows, (None, None), (None, None), native=False)
        if self._tied and path == "embed":
            # An adapter of a tied head changes logits alone: the table that tokens are looked up in stays what it is.
            tied = Site(path, recipe, (TIED_HEAD,), rows, width, attribute="head_lora")
            axis, _ = module.weight.get_metadata()["logical_axes"]
            module.head_lora = self._stack(tied, rows, width, (None, None), (None, axis))

    def experts(self, path: str, module: Experts) -> None:
        """Room in the experts of a layer."""
        for name in ("gate_up", "down"):
            recipe, weight = self._recipes.get(f"{path}.{name}"), getattr(module, name)
            layer = None if recipe is None else expert_of(recipe.pieces[0].name)
            if recipe is None or layer is None or not recipe.by_rows:
                continue
            shape = weight.get_value().shape
            if len(shape) != 3:
                self._hint = " Experts that are packed for this CPU take no adapters: start with --quantization none."
                continue
            E, outputs, inputs = shape
            names = tuple(piece.name for piece in recipe.pieces)
            site = ExpertSite(
                path, recipe, names, outputs, inputs, attribute=f"{name}_lora", layer=layer[0], experts=E, down=name == "down"
            )  # fmt: skip
            expert_axis, out_axis, in_axis = weight.get_metadata()["logical_axes"]
            axes = (expert_axis, in_axis), (expert_axis, out_axis)
            setattr(module, site.attribute, self._stack(site, outputs, inputs, *axes, native=False))

    def _stack(
        self,
        site: Site,
        outputs: int,
        inputs: int,
        a_axes: tuple[str | None, str | None],
        b_axes: tuple[str | None, str | None],
        native: bool = True,
    ) -> Any:
        """A stack of zeros for a site. The axes are those of a slot's [R, I] and [R, O]."""
        self._sites.append(site)
        self._shapes[site.place] = (outputs, inputs)
        R = site.rank(self._max_rank)
        a, b = (
            self._zeros((self._slots + 1, R, width), (None, *axes))
            for width, axes in ((inputs, a_axes), (outputs, b_axes))
        )
        return nnx.data(AdapterStack(LoraStack(a, b, native and self._native)))

    def _zeros(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
        if self._mesh is None:
            return jnp.zeros(shape, self._dtype)
        return jax.device_put(np.zeros(shape, self._dtype), to_sharding(self._mesh, axes, self._rules))

    def room(self) -> Room:
        """What was found."""
        config = self._model.config
        tensors = tuple(dict.fromkeys(name for site in self._sites for name in site.tensors))
        moe = None if config.moe is None else (config.moe.num_experts, config.embed_dim, config.moe.ffw_dim)
        base = Base(tensors, config.num_layers, (config.num_heads, config.num_kv_heads), moe)
        late = frozenset({"head.lora", "embed.head_lora"} & self._shapes.keys())
        return Room(
            tuple(self._sites), self._slots, self._max_rank, self._spreads, self._shapes, late, base, self._hint
        )
