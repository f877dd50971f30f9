"""Room for adapters in a network: beside each weight that they may change, a stack of matrices with a place a slot.

The stacks are variables of the modules whose products they change, apart from the weights, so that a network's own leaves are
what they were and a step in which nobody has an adapter runs the program that it ran before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from models.adapters.adapter import TIED_HEAD, Adapter, Base
from models.adapters.fit import Given, Site, fit
from models.adapters.fit_experts import ExpertSite
from models.layers.embedding import Embedding
from models.layers.linear import AdapterStack, Linear
from models.layers.moe import Experts
from models.loading.files.canonical import canonical_name
from models.loading.files.experts import expert_of
from models.parameters import parameters_of
from models.recipes import Piece, Recipe, row_map
from ops import native
from ops.linear import StoredWeight
from ops.linear.weights.blocks import BlockWeight
from ops.lora import LoraStack, Stretches, paired, paired_shape
from sharding.rules import DEFAULT_RULES, ShardingRules, to_sharding

AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Room:
    """Where a model takes adapters.

    Attributes:
        sites: weights that they may change, in the order in which matrices are packed.
        slots: adapters at once; slot 0, nobody's, comes on top.
        max_rank: of an adapter.
        spreads: by place, how rows or columns are repeated and padded where heads do not divide the mesh.
        shapes: by place, (O, I) as they lie on the devices.
        stretches: by place, where B has only the numbers of each column's own tensor: `LoraStack.stretches`.
        paired: places whose B lies as `ops.lora.paired` has it.
        late: places whose change is made behind the forward pass, where logits are.
        base: what readers of adapters have to know.
        partial: tensors of which another parameter, which takes no adapters, has a part too.
        hint: what to do where an adapter changes weights that take none; "" for nothing.
    """

    sites: tuple[Site, ...]
    slots: int
    max_rank: int
    spreads: Mapping[str, Callable[[np.ndarray], np.ndarray]]
    shapes: Mapping[str, tuple[int, int]]
    stretches: Mapping[str, Stretches]
    paired: frozenset[str]
    late: frozenset[str]
    base: Base
    partial: frozenset[str] = frozenset()
    hint: str = ""

    def is_late(self, adapter: Adapter) -> bool:
        """Whether an adapter of this model changes logits directly."""
        given = Given.of(adapter, self.max_rank)
        return any(site.take(given) is not None for site in self.sites if site.place in self.late)

    def pack(self, adapter: Adapter) -> np.ndarray:
        """All matrices in one float32 array: of each site A [R, I], then B turned as it is stored; zeros where there are none.

        Raises:
            ValueError: it does not fit this model, in a sentence.
        """
        fitted = fit(adapter, self.sites, self.max_rank, self.hint)
        names = {canonical_name(own) for found in fitted.values() for own in found.used}
        if split := sorted(names & self.partial):
            raise ValueError(
                f"{adapter.source}: {split[0]} is several weights here, of which one takes no adapters. Merge the adapter into its "
                "base (`python -m serving.convert --adapter`)."
            )
        parts = []
        for site in self.sites:
            (R, r), (outputs, inputs) = self._ranks(site), self.shapes[site.place]
            if site.place not in fitted:
                parts.append(np.zeros(R * inputs + math.prod(self._shape_of_b(site)), np.float32))
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
            if r < R:
                b_OR = _own_columns(b_OR, self.stretches[site.place], r)
            stored = paired(b_OR.T) if site.place in self.paired else b_OR.T
            parts += [a_RI.reshape(-1), np.ascontiguousarray(stored).reshape(-1)]
        return np.concatenate(parts)

    def _ranks(self, site: Site) -> tuple[int, int]:
        """Rows of A and of B as they lie on the devices."""
        R = site.rank(self.max_rank)
        return R, self.max_rank if site.place in self.stretches else R

    def _shape_of_b(self, site: Site) -> tuple[int, ...]:
        """Of a slot, as it is stored."""
        (_, r), (outputs, _) = self._ranks(site), self.shapes[site.place]
        return paired_shape(r, outputs) if site.place in self.paired else (r, outputs)

    def unpack(self, packed: jax.Array) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Of each site (A [R, I], B as it is stored), inside a program."""
        at = 0
        for site in self.sites:
            shape_of_a, shape_of_b = (self._ranks(site)[0], self.shapes[site.place][1]), self._shape_of_b(site)
            middle = at + math.prod(shape_of_a)
            end = middle + math.prod(shape_of_b)
            a, b = jax.lax.slice(packed, (at,), (middle,)), jax.lax.slice(packed, (middle,), (end,))
            at = end
            yield a.reshape(shape_of_a), b.reshape(shape_of_b)

    @property
    def size(self) -> int:
        """Numbers of a packed adapter."""
        return sum(
            self._ranks(site)[0] * self.shapes[site.place][1] + math.prod(self._shape_of_b(site)) for site in self.sites
        )


def attach(
    model: Any, slots: int, max_rank: int, mesh: Mesh | None, rules: ShardingRules = DEFAULT_RULES, dtype: str = AUTO
) -> Room:
    """Gives a loaded network room for `slots` adapters of rank `max_rank` at most, on its devices.

    Every `Linear` whose weight moves rows of the checkpoint's tensors and nothing else gets a stack (routers too, as "all-linear"
    does), the experts of mixtures and the token table too, and a tied table another one for the logits.

    Args:
        dtype: of the matrices; `AUTO`: float32 beside dense weights in float32, else bfloat16.
    """
    making = _found(model, slots, max_rank, mesh, rules, dtype)
    for module, attribute, stack in making.stacks:
        zeros = jax.tree.map(making.zeros, stack)
        setattr(module, attribute, nnx.data(AdapterStack(zeros)))
    return making.room()


def bytes_of_stacks(
    model: Any, slots: int, max_rank: int, mesh: Mesh | None, rules: ShardingRules = DEFAULT_RULES, dtype: str = AUTO
) -> int:
    """Bytes that `attach` would take on each device. The network's parameters may be shapes."""
    making = _found(model, slots, max_rank, mesh, rules, dtype)
    leaves = jax.tree.leaves([stack for _, _, stack in making.stacks])
    return sum(
        math.prod(leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in leaves
    )


def _found(model: Any, slots: int, max_rank: int, mesh: Mesh | None, rules: ShardingRules, dtype: str) -> _Making:
    """Where a network takes adapters."""
    making = _Making(model, slots, max_rank, mesh, rules, dtype)
    for path, module in sorted((".".join(map(str, path)), module) for path, module in nnx.iter_modules(model)):
        if isinstance(module, Linear):
            making.linear(path, module)
        elif isinstance(module, Embedding):
            making.table(path, module)
        elif isinstance(module, Experts):
            making.experts(path, module)
    return making


class _Making:
    """A room as its sites are found.

    Attributes:
        stacks: (module, attribute, the stack that it is to have, as shapes and places).
    """

    def __init__(
        self, model: Any, slots: int, max_rank: int, mesh: Mesh | None, rules: ShardingRules, dtype: str
    ) -> None:
        self._model, self._slots, self._max_rank = model, slots, max_rank
        self._mesh, self._rules = mesh, rules
        self._recipes = model.recipes()
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        self._native = (mesh is None or mesh.size == 1) and platform == "cpu" and native.available()
        exact = model.compute_dtype == jnp.float32 and not any(
            isinstance(parameter.get_value(), StoredWeight) for _, parameter in parameters_of(model)
        )
        self._dtype = jnp.dtype(("float32" if exact else "bfloat16") if dtype == AUTO else dtype)
        self.stacks: list[tuple[Any, str, LoraStack]] = []
        self._stretches: dict[str, Stretches] = {}
        self._paired: set[str] = set()
        self._tied = getattr(model, "head", None) is None
        self._sites: list[Site] = []
        self._spreads: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._taken: set[str] = set()  # paths of parameters
        self._hint = ""

    def linear(self, path: str, module: Linear) -> None:
        """Room beside a product."""
        recipe, weight = self._recipes.get(f"{path}.weight"), module.weight
        if recipe is None or not recipe.by_rows:
            return
        self._taken.add(f"{path}.weight")
        stored = weight.stored_shape
        site = Site(path, recipe, tuple(piece.name for piece in recipe.pieces), stored[0], stored[-1])
        spread = weight.get_metadata().get("spread")
        if spread is not None:
            self._spreads[site.place] = spread.apply
        elif self._native and len(site.tensors) > 1:
            self._stretches[site.place] = _stretches(recipe)
        outputs, inputs = weight.get_value().shape
        out_axis, in_axis = weight.get_metadata()["logical_axes"]
        self._add(module, site, outputs, inputs, (None, in_axis), (None, out_axis))

    def table(self, path: str, module: Embedding) -> None:
        """Room for the rows of a token table, and beside the logits that a tied one makes."""
        recipe = self._recipes.get(f"{path}.weight")
        if not isinstance(recipe, Piece):
            return
        self._taken.add(f"{path}.weight")
        rows, width = module.weight.get_value().shape
        table = Site(path, recipe, (recipe.name,), width, rows, rows=True)
        self._add(module, table, width, rows, (None, None), (None, None), native=False)
        if self._tied and path == "embed":
            # An adapter of a tied head changes logits alone: the table that tokens are looked up in stays what it is.
            tied = Site(path, recipe, (TIED_HEAD,), rows, width, attribute="head_lora")
            axis, _ = module.weight.get_metadata()["logical_axes"]
            self._add(module, tied, rows, width, (None, None), (None, axis))

    def experts(self, path: str, module: Experts) -> None:
        """Room in the experts of a layer."""
        for name in ("gate_up", "down"):
            recipe, weight = self._recipes.get(f"{path}.{name}"), getattr(module, name)
            layer = None if recipe is None else expert_of(recipe.pieces[0].name)
            if recipe is None or layer is None or not recipe.by_rows:
                continue
            value = weight.get_value()
            shape = value.shape
            if isinstance(value, BlockWeight) and value.has_grouped_kernel():
                shape = (module.sizes[0], shape[0] // module.sizes[0], shape[1])
            if len(shape) != 3:
                self._hint = (
                    " Experts that are packed for this CPU take no adapters: start with --quantization none or int4."
                )
                continue
            self._taken.add(f"{path}.{name}")
            E, outputs, inputs = shape
            names = tuple(piece.name for piece in recipe.pieces)
            site = ExpertSite(
                path, recipe, names, outputs, inputs, attribute=f"{name}_lora", layer=layer[0], experts=E, down=name == "down"
            )  # fmt: skip
            expert_axis, out_axis, in_axis = weight.get_metadata()["logical_axes"]
            axes = (expert_axis, in_axis), (expert_axis, out_axis)
            self._add(module, site, outputs, inputs, *axes, native=False)

    def _add(
        self,
        module: Any,
        site: Site,
        outputs: int,
        inputs: int,
        a_axes: tuple[str | None, str | None],
        b_axes: tuple[str | None, ...],
        native: bool = True,
    ) -> None:
        """A stack for a site. The axes are those of a slot's [R, I] and [R, O]; on a native stack nothing is cut."""
        self._sites.append(site)
        self._shapes[site.place] = (outputs, inputs)
        R, stretches = site.rank(self._max_rank), self._stretches.get(site.place, ())
        native, r = native and self._native, self._max_rank if stretches else R
        of_b: tuple[int, ...] = (r, outputs)
        if native and self._dtype == jnp.bfloat16:
            self._paired.add(site.place)
            of_b, b_axes = paired_shape(r, outputs), (None,) * 4
        a = self._abstract((self._slots + 1, R, inputs), (None, *a_axes))
        b = self._abstract((self._slots + 1, *of_b), (None, *b_axes))
        self.stacks.append((module, site.attribute, LoraStack(a, b, native, stretches)))  # type: ignore[arg-type]

    def _abstract(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        place = None if self._mesh is None else to_sharding(self._mesh, axes, self._rules)
        return jax.ShapeDtypeStruct(shape, self._dtype, sharding=place)

    @staticmethod
    def zeros(abstract: jax.ShapeDtypeStruct) -> jax.Array:
        """What there is before an adapter comes."""
        if abstract.sharding is None:
            return jnp.zeros(abstract.shape, abstract.dtype)
        return jax.device_put(np.zeros(abstract.shape, abstract.dtype), abstract.sharding)

    def room(self) -> Room:
        """What was found."""
        config = self._model.config
        tensors = tuple(dict.fromkeys(name for site in self._sites for name in site.tensors))
        moe = None if config.moe is None else (config.moe.num_experts, config.embed_dim, config.moe.ffw_dim)
        tables = [site for site in self._sites if site.rows]
        tied = next((site.tensors[0] for site in tables if self._tied and site.path == "embed"), "")
        turned = {piece.name for site in self._sites for piece in site.recipe.pieces if piece.turned}
        base = Base(
            tensors, config.num_layers, (config.num_heads, config.num_kv_heads), moe,
            frozenset(canonical_name(site.tensors[0]) for site in tables), tied, frozenset(map(canonical_name, turned)),
            self._max_rank,
        )  # fmt: skip
        late = frozenset({"head.lora", "embed.head_lora"} & self._shapes.keys())
        others = [recipe for path, recipe in self._recipes.items() if path not in self._taken]
        partial = {canonical_name(piece.name) for recipe in others for piece in recipe.pieces}
        return Room(
            tuple(self._sites), self._slots, self._max_rank, self._spreads, self._shapes, self._stretches,
            frozenset(self._paired), late, base, frozenset(partial & set(map(canonical_name, tensors))), self._hint,
        )  # fmt: skip


def _stretches(recipe: Recipe) -> Stretches:
    """Which of a recipe's tensors each row is of, in stretches."""
    mapped = row_map(recipe)
    assert mapped is not None, "sites move rows"
    piece_O, _ = mapped
    ends = [*(np.flatnonzero(np.diff(piece_O)) + 1).tolist(), len(piece_O)]
    return tuple((end, int(piece_O[end - 1])) for end in ends)


def _own_columns(b_OR: np.ndarray, stretches: Stretches, rank: int) -> np.ndarray:
    """Of each row of B [O, R] the numbers of its own tensor: [O, rank]."""
    own_Or = np.empty((len(b_OR), rank), b_OR.dtype)
    begin = 0
    for end, piece in stretches:
        own_Or[begin:end] = b_OR[begin:end, piece * rank : (piece + 1) * rank]
        begin = end
    return own_Or
