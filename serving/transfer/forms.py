"""How a page's rows travel: with the KV heads of the checkpoint, whatever the engine's mesh has made of them.

A mesh that does not divide KV heads repeats or pads them (models/layers/heads.py). Copies and padding stay at home.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from models.config import ModelConfig
from models.layers.heads import PlacedHeads
from serving.engine.device.stores.parts import unpacked


@dataclasses.dataclass(frozen=True)
class Form:
    """Of one array of pages.

    Attributes:
        shape: of a row as it travels.
        dtype: of its numbers.
        heads: where they go here; None where a row travels as it is.
    """

    shape: tuple[int, ...]
    dtype: Any
    heads: PlacedHeads | None = None

    def out(self, row: np.ndarray) -> np.ndarray:
        """A row of this engine as it travels."""
        if self.heads is None:
            return row
        return row[: self.heads.K * self.heads.copies : self.heads.copies]

    def back(self, row: np.ndarray) -> np.ndarray:
        """What came as a row of this engine."""
        return row if self.heads is None else self.heads.keys(row)


def forms_of(arrays: Sequence[Any], config: Any, mesh: jax.sharding.Mesh | None, shared: bool = False) -> list[Form]:
    """Of each array of pages.

    Args:
        config: the model's, with num_kv_heads, group and head_dim.
        shared: layers of different heads share the arrays (`ops.paged_attention.shared`): rows travel as they are, to engines that
            cut heads over as many devices.
    """
    shards = 1 if mesh is None else mesh.shape.get("model", 1)
    placed = None
    if shards > 1 and isinstance(config, ModelConfig) and not shared:
        placed = PlacedHeads(config.num_kv_heads, config.group, config.head_dim, shards)
    found = []
    for array in arrays:
        own, dtype = tuple(array.shape[1:]), np.dtype(array.dtype)
        if placed is None or placed.unchanged or own[0] != placed.kv_heads:
            found.append(Form(own, dtype))
        else:
            found.append(Form((placed.K, *own[1:]), dtype, placed))
    return found


def row_of(content: bytes | memoryview, forms: Sequence[Form]) -> list[np.ndarray]:
    """Every array's row of this engine, from what came of a page.

    Raises:
        ValueError: another number of bytes.
    """
    came = unpacked(content, [jax.ShapeDtypeStruct((1, *form.shape), form.dtype) for form in forms])
    return [form.back(row) for form, row in zip(forms, came, strict=True)]
