"""Weights that stay as their checkpoint stores them: rows of blocks go from the file into the kernels' layout as they are."""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import numpy as np

from models.layers import Weight
from models.parameters import parameters_of, quantizable
from models.recipes import Recipe, Recipes, row_map
from ops import buffers
from ops.linear.weights import block_pack
from ops.linear.weights.block_pack import CodedRows
from ops.linear.weights.blocks import BlockWeight


@runtime_checkable
class CodedCheckpoint(Protocol):
    """A checkpoint some of whose tensors have an exact form in blocks."""

    def coded(self, name: str) -> tuple[CodedRows, np.ndarray | None] | None:
        """A tensor's rows as they are stored, and for each row of `name` which of them it is (None: the same one).

        None where the tensor has no exact form, or is none of rows of its own.
        """
        ...

    def is_coded(self, name: str) -> bool:
        """Whether `coded` would give a tensor's rows; of its header alone."""
        ...


def count_coded(model: Any, checkpoint: object) -> int:
    """How many of a model's weights a checkpoint stores in an exact form, of headers alone; 0 where some matrices that a scheme
    applies to are stored otherwise. Stacks of experts count where they would stay as they are stored."""
    if not isinstance(checkpoint, CodedCheckpoint):
        return 0
    recipes: Recipes = model.recipes()
    parameters, count = dict(parameters_of(model)), 0
    for path in quantizable(model):
        shape, pieces = parameters[path].shape, recipes[path].pieces
        is_coded = recipes[path].by_rows and all(not p.turned and checkpoint.is_coded(p.name) for p in pieces)
        if len(shape) == 2 and not is_coded:
            return 0
        if is_coded and _may_be_coded(parameters[path]):
            count += math.prod(shape)
    return count


def _may_be_coded(parameter: Weight) -> bool:
    """Matrices, and the stacks of experts that kernels compute by themselves."""
    return len(parameter.shape) == 2 or bool(len(parameter.shape) == 3 and parameter.get_metadata().get("packed"))


def coded(recipe: Recipe, parameter: Weight, checkpoint: object) -> BlockWeight | None:
    """The parameter as the checkpoint stores it, of numpy arrays, a stack of experts [E, O, I] as one matrix [E O, I].

    None where it must go by way of floats: experts that kernels do not compute by themselves, or whose inputs are sorted; heads
    that are spread over devices; values that are computed or turned; rows of several types within a panel.

    Raises:
        ValueError: a damaged tensor, by name.
    """
    if not isinstance(checkpoint, CodedCheckpoint) or not _may_be_coded(parameter):
        return None
    if parameter.get_metadata().get("spread") is not None or any(piece.turned for piece in recipe.pieces):
        return None
    rows = row_map(recipe)
    found = [checkpoint.coded(piece.name) for piece in recipe.pieces]
    tensors = [entry for entry in found if entry is not None]
    if rows is None or len(tensors) < len(found):
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
