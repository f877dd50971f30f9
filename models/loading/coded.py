"""Weights that stay as their checkpoint stores them: rows of blocks go from the file into the kernels' layout as they are."""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import numpy as np

from models.layers import Weight
from models.parameters import may_be_in_blocks, parameters_of, quantizable
from models.recipes import Recipe, Recipes, row_map
from ops import buffers
from ops.linear.weights import block_pack
from ops.linear.weights.block_pack import CodedRows
from ops.linear.weights.blocks import BlockWeight


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


def count_coded(model: Any, checkpoint: object) -> int:
    """How many of a model's weights a checkpoint stores in an exact form, of headers alone; 0 where that is less than half of those
    that a scheme applies to: mixtures may have their experts alone in few bits, which are nearly all of them."""
    if not isinstance(checkpoint, CodedCheckpoint):
        return 0
    recipes: Recipes = model.recipes()
    parameters, count, total = dict(parameters_of(model)), 0, 0
    for path in quantizable(model):
        size, pieces = math.prod(parameters[path].shape), recipes[path].pieces
        is_coded = recipes[path].by_rows and all(checkpoint.is_coded(p.name, p.turned) for p in pieces)
        count += size if is_coded and may_be_in_blocks(parameters[path]) else 0
        total += size
    return count if 2 * count >= total else 0


def coded(recipe: Recipe, parameter: Weight, checkpoint: object) -> BlockWeight | None:
    """The parameter as the checkpoint stores it, of numpy arrays, a stack of experts [E, O, I] as one matrix [E O, I].

    None where it must go by way of floats: experts that are no whole panels, or whose inputs are sorted; heads that are spread over
    devices; values that are computed; rows of several types within a panel.

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
        return block_pack.pack(codes, tensor_R, row_R, buffers.lasting.empty)
    except ValueError as error:
        raise ValueError(f"{' and '.join(piece.name for piece in recipe.pieces)}: {error}") from None
