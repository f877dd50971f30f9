"""Recipes: from which checkpoint tensors a parameter comes, and which of their rows it has in what order.

A recipe is data. Its leaves are `Piece`s, tensors by Hugging Face's names with the shapes that they must have, so that a wrong
tensor is an error that names it before anything is computed; its nodes select, deal out and join *rows*, all axes but the last.
So one recipe arranges whatever comes by rows: dense values, values packed in a few bits, their scales, an adapter's B matrix;
`row_map` says for each row of the parameter which row of which tensor it is. `Computed` is for the few parameters that are made
of other numbers than the checkpoint has; those come as dense values only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ops import buffers

Leaf = Callable[["Piece"], np.ndarray]
"""Gives an array with one entry a row of a piece on its first axis."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one parameter is made; a node of the tree."""

    def leaves(self) -> Iterator[Piece]:
        """Its pieces, in order; one that is used twice comes twice."""
        for source in self.sources:
            yield from source.leaves()

    @property
    def sources(self) -> tuple[Recipe, ...]:
        return ()

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The tensors it needs, each once."""
        return tuple({piece.name: piece for piece in self.leaves()}.values())

    @property
    def by_rows(self) -> bool:
        """Whether it only moves rows, so that `row_map` can follow it."""
        return all(source.by_rows for source in self.sources)

    @property
    def invertible(self) -> bool:
        """Whether `given_back` can make the tensors again."""
        return self.by_rows

    def make(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """The parameter's values [rows, ...], from the tensors that `read` gives for their names; maybe a view of one."""
        found = {piece.name: read(piece.name) for piece in self.pieces}
        return self.arrange(lambda piece: piece.rows_of(found[piece.name]))

    def arrange(self, leaf: Leaf) -> np.ndarray:
        """The rows that `leaf` gives for each piece, in the parameter's order."""
        raise NotImplementedError

    def fill(self, out: np.ndarray, leaf: Leaf) -> None:
        """`arrange` into an array; only nodes that copy anyway do better than this."""
        buffers.copy(out, self.arrange(leaf).reshape(out.shape))


@dataclasses.dataclass(frozen=True)
class Piece(Recipe):
    """One tensor of the checkpoint.

    Attributes:
        name: Hugging Face's.
        shape: as the checkpoint must have it.
        turned: it is stored [..., in, out]: its last two axes are swapped before its rows are counted.
        vector: its last axis is no row's content but part of the rows' number, as in biases [E, O]. Tensors of one axis
            are so by themselves.
    """

    name: str
    shape: tuple[int, ...]
    turned: bool = False
    vector: bool = False

    @property
    def width(self) -> tuple[int, ...]:
        """The shape of a row."""
        if self.vector or len(self.shape) < 2:
            return ()
        return (self.shape[-2] if self.turned else self.shape[-1],)

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape) // max(1, math.prod(self.width))

    def leaves(self) -> Iterator[Piece]:
        yield self

    def rows_of(self, array: np.ndarray) -> np.ndarray:
        """The tensor's values as [rows, *width]; a view where that can be."""
        return (array.swapaxes(-1, -2) if self.turned else array).reshape(-1, *self.width)

    def arrange(self, leaf: Leaf) -> np.ndarray:
        return leaf(self)


@dataclasses.dataclass(frozen=True)
class Rows(Recipe):
    """Of every `block` rows those from `start` to `stop`, each `step`-th.

    Attributes:
        block: None: all rows are one block.
    """

    source: Recipe
    start: int = 0
    stop: int | None = None
    step: int = 1
    block: int | None = None

    @property
    def sources(self) -> tuple[Recipe, ...]:
        return (self.source,)

    def arrange(self, leaf: Leaf) -> np.ndarray:
        array = self.source.arrange(leaf)
        if self.block in (None, len(array)):
            return array[self.start : self.stop : self.step]
        kept = array.reshape(-1, self.block, *array.shape[1:])[:, self.start : self.stop : self.step]
        out = buffers.empty(kept.shape, array.dtype)
        buffers.copy(out, kept)
        return out.reshape(-1, *array.shape[1:])


@dataclasses.dataclass(frozen=True)
class Deal(Recipe):
    """Each source's rows cut in `parts` equal parts, which are dealt in turn: first parts of all, then the second ones."""

    parts: int
    dealt: tuple[Recipe, ...]

    @property
    def sources(self) -> tuple[Recipe, ...]:
        return self.dealt

    def arrange(self, leaf: Leaf) -> np.ndarray:
        arrays = [source.arrange(leaf) for source in self.dealt]
        out = buffers.empty((sum(len(array) for array in arrays), *arrays[0].shape[1:]), _common(arrays))
        self._deal(out, arrays)
        return out

    def fill(self, out: np.ndarray, leaf: Leaf) -> None:
        self._deal(out, [source.arrange(leaf) for source in self.dealt])

    def _deal(self, out: np.ndarray, arrays: Sequence[np.ndarray]) -> None:
        rest = out.shape[1:]
        hands, begin = out.reshape(self.parts, -1, *rest), 0
        for array in arrays:
            part = array.reshape(self.parts, -1, *rest)
            buffers.copy(hands[:, begin : begin + part.shape[1]], part)
            begin += part.shape[1]


@dataclasses.dataclass(frozen=True)
class Stack(Recipe):
    """All rows of the first source, then those of the second, ...; the sources have equally many."""

    stacked: tuple[Recipe, ...]

    @property
    def sources(self) -> tuple[Recipe, ...]:
        return self.stacked

    def arrange(self, leaf: Leaf) -> np.ndarray:
        first = self.stacked[0].arrange(leaf)
        out = buffers.empty((len(self.stacked), *first.shape), first.dtype)
        buffers.copy(out[0], first)
        for entry, source in zip(out[1:], self.stacked[1:], strict=True):
            source.fill(entry, leaf)
        return out.reshape(-1, *first.shape[1:])


@dataclasses.dataclass(frozen=True)
class Computed(Recipe):
    """What `function` makes of its sources' values.

    Attributes:
        inverse: makes the one source's values of the parameter's, where that can be.
    """

    computed: tuple[Recipe, ...]
    function: Callable[..., np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def sources(self) -> tuple[Recipe, ...]:
        return self.computed

    @property
    def by_rows(self) -> bool:
        return False

    @property
    def invertible(self) -> bool:
        return self.inverse is not None

    def arrange(self, leaf: Leaf) -> np.ndarray:
        return self.function(*(source.arrange(leaf) for source in self.computed))

    def make(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        # Whole tensors, with the axes that the checkpoint gives them.
        found = {piece.name: read(piece.name) for piece in self.pieces}
        return self.arrange(lambda piece: found[piece.name])


Recipes = dict[str, Recipe]
"""Parameter path ("layers.0.attn.qkv.weight") -> its recipe."""


def row_map(recipe: Recipe) -> tuple[np.ndarray, np.ndarray] | None:
    """(piece_R, row_R) int64: row r of the parameter is row `row_R[r]` of `recipe.pieces[piece_R[r]]`.

    None where the parameter's values are computed.
    """
    if not recipe.by_rows:
        return None
    first = np.cumsum([0, *(piece.num_rows for piece in recipe.pieces)])
    place = {piece.name: index for index, piece in enumerate(recipe.pieces)}
    ids_R = recipe.arrange(lambda piece: np.arange(piece.num_rows) + first[place[piece.name]])
    piece_R = np.searchsorted(first, ids_R, side="right") - 1
    return piece_R, ids_R - first[piece_R]


def given_back(values: Iterable[tuple[Recipe, np.ndarray]]) -> dict[str, np.ndarray]:
    """The tensors that parameters were made from, by name: the other way round.

    Args:
        values: invertible recipes and their parameters' values, in the shape that recipes assemble. A tensor of which several
            parameters have rows needs all of them.
    """
    rows: dict[str, tuple[Piece, np.ndarray]] = {}
    tensors: dict[str, np.ndarray] = {}
    for recipe, array in values:
        if isinstance(recipe, Computed):
            assert recipe.inverse is not None, "not invertible"
            (piece,) = recipe.pieces
            tensors[piece.name] = recipe.inverse(array).reshape(piece.shape)
            continue
        mapped = row_map(recipe)
        assert mapped is not None
        piece_R, row_R = mapped
        array = array.reshape(len(piece_R), *recipe.pieces[0].width)
        for index, piece in enumerate(recipe.pieces):
            _, out = rows.setdefault(piece.name, (piece, np.zeros((piece.num_rows, *piece.width), array.dtype)))
            here = piece_R == index
            out[row_R[here]] = array[here]
    for name, (piece, out) in rows.items():
        shape = (*piece.shape[:-2], piece.shape[-1], piece.shape[-2]) if piece.turned else piece.shape
        tensors[name] = (
            np.ascontiguousarray(out.reshape(shape).swapaxes(-1, -2)) if piece.turned else out.reshape(shape)
        )
    return tensors


def one(
    name: str,
    *shape: int,
    turned: bool = False,
    vector: bool = False,
    assemble: Callable[[np.ndarray], np.ndarray] | None = None,
    inverse: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Recipe:
    """A parameter made of one tensor; `assemble`, where given, computes it of the tensor's values, and `inverse` those of it."""
    piece = Piece(name, shape, turned, vector)
    return piece if assemble is None else Computed((piece,), assemble, inverse)


def under(prefix: str, recipes: Recipes) -> Recipes:
    """The same recipes, their paths below `prefix`."""
    return {f"{prefix}.{path}": recipe for path, recipe in recipes.items()}


def deal(parts: int, *sources: Recipe) -> Recipe:
    """The sources' rows, each source cut in `parts` equal parts and dealt in turn.

    q [K G h], k [K h] and v [K h] dealt in K parts are rows [K, G + 2, h]: `Attention.qkv`. gate [F] and up [F] dealt in S
    parts are rows [S, 2, F / S]: `GatedMLP.gate_up`.
    """
    return Deal(parts, sources)


def split(source: Recipe, *counts: int) -> tuple[Recipe, ...]:
    """The first `counts[0]` rows, then the next `counts[1]`, ...; where several blocks of sum(counts) follow each other,
    those of each block."""
    begins = [sum(counts[:index]) for index in range(len(counts))]
    return tuple(
        Rows(source, begin, begin + count, block=sum(counts)) for begin, count in zip(begins, counts, strict=True)
    )


def alternating(source: Recipe, count: int) -> tuple[Recipe, ...]:
    """`count` recipes: row r of the source belongs to the (r modulo count)-th."""
    return tuple(Rows(source, index, step=count) for index in range(count))


def pieces(names: Sequence[str], *shapes: tuple[int, ...]) -> tuple[Piece, ...]:
    """Several tensors, each with its shape."""
    return tuple(Piece(name, shape) for name, shape in zip(names, shapes, strict=True))


def _common(arrays: Sequence[np.ndarray]) -> Any:
    """The dtype that holds all of them: float32 where they differ."""
    return arrays[0].dtype if all(array.dtype == arrays[0].dtype for array in arrays) else np.dtype(np.float32)
