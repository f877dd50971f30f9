"""An adapter as a network's parameters want it: for each of them one A and one B, through the parameter's own recipe.

Where a parameter is several tensors of the checkpoint in one (q, k and v; gate and up), the A of all are stacked and each row of B
has its values in the columns of the tensor that it came from. Experts: models/adapters/fit_experts.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from models.adapters.adapter import Adapter, Pair
from models.loading.files.canonical import canonical_name
from models.recipes import Recipe, row_map


@dataclasses.dataclass(frozen=True)
class Given:
    """An adapter by the names of the plain language model: wrappers put words in front or in between.

    Attributes:
        names: such a name -> the one in the adapter's file.
        max_rank: that a slot has room for.
    """

    adapter: Adapter
    names: Mapping[str, str]
    max_rank: int

    @classmethod
    def of(cls, adapter: Adapter, max_rank: int) -> Given:
        plain = {canonical_name(own): own for own in adapter.pairs}
        return cls(adapter, plain | {own: own for own in adapter.pairs}, max_rank)

    def own_name(self, name: str) -> str | None:
        """What the file calls the matrices of a tensor; None where it has none. transformers calls Mixtral's mixture `mlp` where
        its checkpoints have another name."""
        plain = canonical_name(name)
        names = (name, plain, plain.replace(".block_sparse_moe.", ".mlp."))
        return next((self.names[one] for one in names if one in self.names), None)


@dataclasses.dataclass(frozen=True)
class Matrices:
    """What an adapter changes of one parameter: A [R, I], B [O, R], zeros beyond its rank; and which of its names they were."""

    a_RI: np.ndarray
    b_OR: np.ndarray
    used: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Site:
    """A parameter that adapters may change.

    Attributes:
        path: of the module ("layers.0.attn.qkv").
        recipe: of its weight.
        tensors: names of the checkpoint's tensors in it.
        outputs, inputs: O and I as the checkpoint has them; of a table of rows D and V.
        rows: it is a table of rows, not a product: A has a column a row.
        attribute: where the module has the stack.
    """

    path: str
    recipe: Recipe
    tensors: tuple[str, ...]
    outputs: int
    inputs: int
    rows: bool = False
    attribute: str = "lora"

    @property
    def place(self) -> str:
        """The path of its stack in the network."""
        return f"{self.path}.{self.attribute}"

    def rank(self, rank: int) -> int:
        """Columns of B for adapters of such a rank."""
        return rank * len(self.tensors)

    def take(self, given: Given) -> Matrices | None:
        """What an adapter changes here; None where it changes nothing.

        Raises:
            ValueError: matrices of another shape than the weight's.
        """
        found = {name: own for name in self.tensors if (own := given.own_name(name)) is not None}
        if not found:
            return None
        R, source = self.rank(given.max_rank), given.adapter.source
        a_RI = np.zeros((R, self.inputs), np.float32)
        if self.rows:  # peft's A is [r, V], its B [D, r]: the rows are A's columns
            piece_O, row_O = np.zeros(self.outputs, np.int64), np.arange(self.outputs)
        else:
            mapped = row_map(self.recipe)
            assert mapped is not None, "sites move rows"
            piece_O, row_O = mapped
        b_OR = np.zeros((len(piece_O), R), np.float32)
        for index, name in enumerate(self.tensors):
            if name not in found:
                continue
            pair = given.adapter.pairs[found[name]]
            begin = index * given.max_rank
            check_shape(
                pair, name, self.outputs if self.rows else self.recipe.pieces[index].num_rows, self.inputs, source
            )
            a_RI[begin : begin + pair.rank] = pair.a_rI
            here = piece_O == index
            b_OR[here, begin : begin + pair.rank] = pair.b_Or[row_O[here]]
        return Matrices(a_RI, b_OR, frozenset(found.values()))


def check_shape(pair: Pair, name: str, outputs: int, inputs: int, source: str) -> None:
    """Refuses matrices of another weight's shape.

    Raises:
        ValueError: in a sentence.
    """
    if (pair.b_Or.shape[0], pair.a_rI.shape[1]) != (outputs, inputs):
        raise ValueError(
            f"{source}: the matrices of {name} are for a weight of [{pair.b_Or.shape[0]}, {pair.a_rI.shape[1]}]; "
            f"the served model's is [{outputs}, {inputs}]."
        )


def fit(adapter: Adapter, sites: Iterable[Site], max_rank: int, hint: str = "") -> dict[str, Matrices]:
    """`Site.place` -> what the adapter changes there. Only places that it changes are there.

    Args:
        hint: told with what changes nothing.
    Raises:
        ValueError: a pair of another shape than its weight, a rank above the limit, or one that changes nothing here.
    """
    if adapter.rank > max_rank:
        raise ValueError(f"{adapter.source} has rank {adapter.rank}; --max-lora-rank is {max_rank}.")
    given = Given.of(adapter, max_rank)
    taken = {site.place: site.take(given) for site in sites}
    fitted = {place: found for place, found in taken.items() if found is not None}
    used = {own for found in fitted.values() for own in found.used}
    left = sorted(adapter.pairs.keys() - used)
    if left:
        raise ValueError(
            f"{adapter.source}: {len(left)} of its {len(adapter.pairs)} matrices change no weight of the served model "
            f"({', '.join(left[:3])}{', ...' if len(left) > 3 else ''}).{hint}"
        )
    return fitted
