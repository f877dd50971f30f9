"""A model's parameters by their paths, which recipes, checkpoints of our own and the planner name them by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx

from models.layers import Embedding, Linear, Weight
from models.layers.moe import Experts


def parameters_of(model: nnx.Module) -> Iterator[tuple[str, Weight]]:
    """(path, parameter) of every parameter, paths as in recipes."""
    for path, _ in nnx.to_flat_state(nnx.state(model, Weight)):
        yield ".".join(map(str, path)), _at(model, path)


def _at(node: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        node = node[part] if isinstance(part, int) else getattr(node, part)
    return node


EXACT = ("patch", "router", "shared_gate", "gates", "decay", "decay_narrow", "predict", "correct")
"""Linears that stay as they are under every scheme."""


def quantizable(model: nnx.Module) -> Iterator[str]:
    """Paths of the weights that a quantization scheme applies to: those of Linears, experts and a tied embedding.

    Not routers: they are small, and a rounded score sends a token to another expert. Nor what says how fast a state decays: its
    errors add up. Nor what makes patches of pixels vectors, or AltUp's maps of a few numbers.
    """
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Experts):
            yield from (".".join(map(str, (*path, part))) for part in ("gate_up", "down"))
        elif isinstance(module, Linear):
            if path[-1] not in EXACT and not getattr(module, "exact", False):
                yield ".".join(map(str, (*path, "weight")))
        elif isinstance(module, Embedding) and getattr(model, "head", None) is None:
            yield ".".join(map(str, (*path, "weight")))


def tables(model: nnx.Module) -> Iterator[str]:
    """Paths of token tables, which are only looked up where there is a head of its own."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Embedding):
            yield ".".join(map(str, (*path, "weight")))


def experts(model: nnx.Module) -> Iterator[str]:
    """Paths of the modules whose weights a token meets a part of: those of the experts that it is sent to."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Experts):
            yield ".".join(map(str, path))
