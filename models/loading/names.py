"""Recipes: which checkpoint tensors a parameter is made of, and how.

Checkpoints are addressed by Hugging Face's tensor names; `models.loading.gguf` translates them for GGUF files. A recipe
gives the shapes that it expects, so that a wrong tensor is an error that names it before anything is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from models.loading import buffers


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of the checkpoint, by Hugging Face's name, and the shape that it must have."""

    name: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one parameter is made.

    Attributes:
        pieces: the tensors it needs.
        assemble: (their arrays, in order) -> the parameter's array, of any float dtype. None: the one piece as it is.
    """

    pieces: tuple[Piece, ...]
    assemble: Callable[..., np.ndarray] | None = None


Recipes = dict[str, Recipe]
"""Parameter path ("layers.0.attn.qkv.weight") -> its recipe."""


def one(name: str, *shape: int, assemble: Callable[[np.ndarray], np.ndarray] | None = None) -> Recipe:
    """A parameter made of one tensor."""
    return Recipe((Piece(name, shape),), assemble)


def under(prefix: str, recipes: Recipes) -> Recipes:
    """The same recipes, their paths below `prefix`."""
    return {f"{prefix}.{path}": recipe for path, recipe in recipes.items()}


def interleave_heads(kv_heads: int, group: int) -> Callable[..., np.ndarray]:
    """q [K G h, ...], k [K h, ...], v [K h, ...] -> rows laid out [K, G + 2, h]: `Attention.qkv`."""

    def assemble(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        rest = q.shape[1:]
        head_dim = k.shape[0] // kv_heads
        out = buffers.empty((kv_heads, group + 2, head_dim, *rest), q.dtype)
        buffers.copy(out[:, :group], q.reshape(kv_heads, group, head_dim, *rest))
        buffers.copy(out[:, group], k.reshape(kv_heads, head_dim, *rest))
        buffers.copy(out[:, group + 1], v.reshape(kv_heads, head_dim, *rest))
        return out.reshape(-1, *rest)

    return assemble


def split_heads(kv_heads: int, group: int, head_dim: int) -> Callable[[np.ndarray], np.ndarray]:
    """One tensor with rows q, then k, then v -> rows laid out [K, G + 2, h]."""

    def assemble(qkv: np.ndarray) -> np.ndarray:
        q, k, v = np.split(qkv, [kv_heads * group * head_dim, kv_heads * (group + 1) * head_dim])
        return interleave_heads(kv_heads, group)(q, k, v)

    return assemble


def interleave_shards(shards: int) -> Callable[..., np.ndarray]:
    """gate [F, ...] and up [F, ...] -> rows laid out [S, 2, F / S]: `GatedMLP.gate_up`."""

    def assemble(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        width, rest = gate.shape[0], gate.shape[1:]
        out = buffers.empty((shards, 2, width // shards, *rest), gate.dtype)
        buffers.copy(out[:, 0], gate.reshape(shards, -1, *rest))
        buffers.copy(out[:, 1], up.reshape(shards, -1, *rest))
        return out.reshape(2 * width, *rest)

    return assemble


def split_shards(shards: int) -> Callable[[np.ndarray], np.ndarray]:
    """One tensor with rows gate, then up -> rows laid out [S, 2, F / S]."""

    def assemble(gate_up: np.ndarray) -> np.ndarray:
        return interleave_shards(shards)(*np.split(gate_up, 2))

    return assemble


def pieces(names: Sequence[str], *shapes: tuple[int, ...]) -> tuple[Piece, ...]:
    """Several tensors, each with its shape."""
    return tuple(Piece(name, shape) for name, shape in zip(names, shapes, strict=True))
