"""An adapter as a network's parameters want it: for each of them one A and one B, through the parameter's own recipe.

Where a parameter is several tensors of the checkpoint in one (q, k and v; gate and up), the A of all are stacked and each row of B
has its values in the columns of the tensor that it came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from models.adapters.adapter import Adapter, Pair
from models.recipes import Recipe, row_map


@dataclasses.dataclass(frozen=True)
class Site:
    """A parameter that adapters may change.

    Attributes:
        path: of the module ("layers.0.attn.qkv").
        recipe: of its weight.
        tensors: names of the checkpoint's tensors in it.
        outputs, inputs: O and I as the checkpoint has them.
        embedding: it is a table of rows, not a product.
    """

    path: str
    recipe: Recipe
    tensors: tuple[str, ...]
    outputs: int
    inputs: int
    embedding: bool = False

    def rank(self, rank: int) -> int:
        """Columns of B for adapters of such a rank."""
        return rank * len(self.tensors)


def fit(adapter: Adapter, sites: Iterable[Site], max_rank: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Module path -> (A [R, I], B [O, R]), R = `Site.rank(max_rank)`, zeros where the adapter has less.

    Only sites that the adapter changes are there.

    Raises:
        ValueError: a pair of another shape than its weight, a rank above the limit, or one that changes nothing here.
    """
    if adapter.rank > max_rank:
        raise ValueError(f"{adapter.source} has rank {adapter.rank}; --max-lora-rank is {max_rank}.")
    used: set[str] = set()
    fitted = {}
    for site in sites:
        mine = {name: adapter.pairs[own] for name, own in _own_names(adapter.pairs, site.tensors)}
        if not mine:
            continue
        used.update(own for _, own in _own_names(adapter.pairs, site.tensors))
        fitted[site.path] = _site(site, mine, max_rank, adapter.source)
    left = sorted(adapter.pairs.keys() - used)
    if left:
        raise ValueError(
            f"{adapter.source}: {len(left)} of its {len(adapter.pairs)} matrices change no weight of the served model "
            f"({', '.join(left[:3])}{', ...' if len(left) > 3 else ''})."
        )
    return fitted


def _own_names(pairs: Mapping[str, Pair], tensors: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(the checkpoint's name, the adapter's name of it): wrappers put words in front or in between."""
    for name in tensors:
        for own in (
            name,
            f"model.{name}",
            name.replace("model.", "model.language_model.", 1),
            f"language_model.{name}",
        ):
            if own in pairs:
                yield name, own
                break


def _site(site: Site, mine: Mapping[str, Pair], max_rank: int, source: str) -> tuple[np.ndarray, np.ndarray]:
    R = site.rank(max_rank)
    a_RI = np.zeros((R, site.inputs), np.float32)
    mapped = row_map(site.recipe)
    if mapped is None:
        raise ValueError(f"{source}: {site.path} is computed of other tensors: adapters cannot change it.")
    piece_O, row_O = mapped
    pieces = site.recipe.pieces
    b_OR = np.zeros((len(piece_O), R), np.float32)
    for index, piece in enumerate(pieces):
        pair = mine.get(piece.name)
        if pair is None:
            continue
        begin = index * max_rank
        rows = piece.num_rows
        if pair.a_rI.shape[1] != site.inputs or pair.b_Or.shape[0] != rows:
            raise ValueError(
                f"{source}: the matrices of {piece.name} are for a weight of [{pair.b_Or.shape[0]}, {pair.a_rI.shape[1]}]; "
                f"the served model's is [{rows}, {site.inputs}]."
            )
        a_RI[begin : begin + pair.rank] = pair.a_rI
        here = piece_O == index
        b_OR[here, begin : begin + pair.rank] = pair.b_Or[row_O[here]]
    return a_RI, b_OR
