"""Weights that stay as their checkpoint stores them: rows of blocks go from the file into the kernels' layout as they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from models.layers import Weight
from models.parameters import may_be_in_blocks, parameters_of, quantizable
from models.recipes import Piece, Recipe, Recipes, row_map
from ops import buffers, native
from ops.linear.weights import block_pack
from ops.linear.weights.block_pack import CodedRows
from ops.linear.weights.blocks import BlockWeight
from ops.linear.weights.group_pack import Rows, rows_of_blocks

Empty = Callable[[tuple[int, ...], Any], np.ndarray]


@runtime_checkable
class CodedCheckpoint(Protocol):
    """A checkpoint some of whose tensors have an exact form in blocks."""

    def coded(self, name: str, turned: bool = False) -> tuple[CodedRows, np.ndarray | None] | None:
        """A tensor's rows as they are stored, and for each row of `name` which of them it is (None: the same one).

        None where the tensor has no exact form, or is none of rows of its own.

        Args:
            turned: its rows lie along its last axis, as in `models.recipes.Piece`; those of all its matrices, one after the other.
        """
        ...

    def is_coded(self, name: str, turned: bool = False) -> bool:
        """Whether `coded` would give a tensor's rows; of its header alone."""
        ...


@runtime_checkable
class NarrowCheckpoint(Protocol):
    """A checkpoint some of whose tensors are float8 or signed bytes with scales."""

    def narrow(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """A matrix [O, I] as it is stored, and a float32 scale for each group of neighbours of a row, [O, groups]. None where it is
        not that alone."""
        ...

    def is_narrow(self, name: str, turned: bool = False) -> bool:
        """Whether `narrow` would give it, as far as headers say it; `turned` as for `CodedCheckpoint`."""
        ...


def count_coded(model: Any, checkpoint: object, narrow: bool = False) -> int:
    """How many of a model's weights a checkpoint stores in an exact form, of headers alone; 0 where that is less than half of those
    that a scheme applies to: mixtures may have their experts alone in few bits, which are nearly all of them.

    Args:
        narrow: float8 and signed bytes with scales are such a form, too.
    """
    if not isinstance(checkpoint, CodedCheckpoint):
        return 0

    def is_kept(piece: Piece) -> bool:
        if checkpoint.is_coded(piece.name, piece.turned):
            return True
        return narrow and isinstance(checkpoint, NarrowCheckpoint) and checkpoint.is_narrow(piece.name, piece.turned)

    recipes: Recipes = model.recipes()
    parameters, count, total = dict(parameters_of(model)), 0, 0
    for path in quantizable(model):
        size, pieces = math.prod(parameters[path].shape), recipes[path].pieces
        is_coded = recipes[path].by_rows and all(is_kept(piece) for piece in pieces)
        count += size if is_coded and may_be_in_blocks(parameters[path]) else 0
        total += size
    return count if 2 * count >= total else 0


def in_groups(recipe: Recipe, parameter: Weight, checkpoint: object) -> Rows | None:
    """The parameter's rows as the checkpoint stores them, for weights of accelerators; None where they must go by way of floats.

    Raises:
        ValueError: a damaged tensor, by name.
    """
    blocks = coded(recipe, parameter, checkpoint, np.empty) if native.available() else None
    if blocks is not None:
        return rows_of_blocks(blocks)
    rows = row_map(recipe)
    if parameter.get_metadata().get("spread") is not None or rows is None or not may_be_in_blocks(parameter):
        return None
    if not isinstance(checkpoint, NarrowCheckpoint):
        return None
    if not all(checkpoint.is_narrow(piece.name, piece.turned) for piece in recipe.pieces):
        return None
    found = [checkpoint.narrow(piece.name) for piece in recipe.pieces]
    tensors = [entry for entry in found if entry is not None]
    groups = [scale_OG.shape[1] for _, scale_OG in tensors]
    alike = len({values_OI.dtype for values_OI, _ in tensors}) == 1
    if len(tensors) < len(found) or not alike or any(max(groups) % count for count in groups):
        return None
    tensor_R, row_R = rows
    first = np.cumsum([0, *(len(values_OI) for values_OI, _ in tensors)])[tensor_R] + row_R
    scales = [np.repeat(scale_OG, max(groups) // scale_OG.shape[1], axis=1) for _, scale_OG in tensors]
    return Rows(np.concatenate([values for values, _ in tensors])[first], np.concatenate(scales)[first], None, 8)


def coded(
    recipe: Recipe, parameter: Weight, checkpoint: object, empty: Empty = buffers.lasting.empty
) -> BlockWeight | None:
    """The parameter as the checkpoint stores it, of numpy arrays, a stack of experts [E, O, I] as one matrix [E O, I].

    None where it must go by way of floats: experts that are no whole panels, or whose inputs are sorted; heads that are spread over
    devices; values that are computed; rows of several types within a panel.

    Args:
        empty: (shape, dtype) -> where the result goes.
    Raises:
        ValueError: a damaged tensor, by name.
    """
    if not isinstance(checkpoint, CodedCheckpoint) or not may_be_in_blocks(parameter):
        return None
    rows = row_map(recipe)
    if parameter.get_metadata().get("spread") is not None or rows is None:
        return None
    if not all(checkpoint.is_coded(piece.name, piece.turned) for piece in recipe.pieces):
        return None
    found = [checkpoint.coded(piece.name, piece.turned) for piece in recipe.pieces]
    tensors = [entry for entry in found if entry is not None]
    if len(tensors) < len(found):
        return None
    tensor_R, row_R = rows
    for index, (_, order) in enumerate(tensors):
        if order is not None:
            row_R = np.where(tensor_R == index, order[np.where(tensor_R == index, row_R, 0)], row_R)
    codes = [code for code, _ in tensors]
    if len(parameter.shape) == 3 and any(code.order_I is not None for code in codes):
        return None
    forms = list(dict.fromkeys(code.form for code in codes))
    if not block_pack.same_order(codes) or not block_pack.can_pack(
        np.array([forms.index(code.form) for code in codes])[tensor_R]
    ):
        return None
    try:
        return block_pack.pack(codes, tensor_R, row_R, empty)
    except ValueError as error:
        raise ValueError(f"{' and '.join(piece.name for piece in recipe.pieces)}: {error}") from None
