"""A model's parameters by their paths, which recipes, checkpoints of our own and the planner name them by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx

from models.layers import MLP, Attention, Embedding, GatedMLP, Linear, Weight
from models.layers.moe import Experts
from ops.linear import StoredWeight
from ops.linear.weights.int8 import PANEL


def parameters_of(model: nnx.Module) -> Iterator[tuple[str, Weight]]:
    """(path, parameter) of every parameter, paths as in recipes."""
    for path, _ in nnx.to_flat_state(nnx.state(model, Weight)):
        yield ".".join(map(str, path)), _at(model, path)


def forms_of(model: nnx.Module) -> list[tuple[str, str]]:
    """(path, how it is stored) of every parameter: checkpoints of one configuration may have their weights in different blocks, and
    a program takes those alone that it was compiled for."""
    values = ((path, parameter.get_value()) for path, parameter in parameters_of(model))
    return [
        (path, value.form() if isinstance(value, StoredWeight) else f"{value.shape} {value.dtype}")
        for path, value in values
    ]


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


def rounded_by(model: nnx.Module, scheme: str | None) -> set[str]:
    """Paths of all that a scheme rounds: what is `quantizable`; "int4" also the token table beside a head of its own."""
    if scheme is None:
        return set()
    return set(quantizable(model)) | ({"embed.weight"} & set(tables(model)) if scheme == "int4" else set())


def may_be_in_blocks(parameter: Weight) -> bool:
    """Matrices, and stacks of experts of whole panels."""
    return len(parameter.shape) == 2 or bool(len(parameter.shape) == 3 and parameter.get_metadata().get("blocks"))


def finer(model: nnx.Module) -> dict[str, tuple[int, int]]:
    """Which rows the scheme "int4" rounds to six bits, by the paths of their weights: `ops.linear.weights.block_round.Finer`.

    Those that cost predictions most for their size (docs/benchmarks/notes_matmul.md): the head; of some layers, the first and the
    last ones among them, the last product of feed-forward blocks, and v; v of all layers where several query heads share one. They
    are no more than llama.cpp's Q4_K_M has in six bits.
    """
    found: dict[str, tuple[int, int]] = {}
    head, layers = getattr(model, "head", None), getattr(getattr(model, "config", None), "num_layers", 0)
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        layer = int(str(path[1])) if len(path) > 1 and path[0] == "layers" and str(path[1]).isdigit() else None
        if module is head or (head is None and name == "embed"):
            found[f"{name}.weight"] = (1, 0)
        if layer is None:
            continue
        chosen = _is_chosen(layer, layers)
        if isinstance(module, Attention):
            K, G, h = module.heads
            block, first = (G + 2) * h, (G + 1) * h  # of each head its queries', its k's and its v's
            is_plain = module.qkv.weight.shape[0] == K * block and not block % PANEL and not first % PANEL
            if is_plain and (chosen or G >= FEW_V):
                found[f"{name}.qkv.weight"] = (block, first)
        elif chosen and isinstance(module, MLP | GatedMLP | Experts):
            found[f"{name}.down" if isinstance(module, Experts) else f"{name}.down.weight"] = (1, 0)
    return found


FEW_V = 3
"""Query heads of each v from which on v of all layers is small."""


def _is_chosen(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every fourth between them."""
    eighth = layers // 8
    return layer < eighth or layer >= layers - eighth or (layer - eighth) % 4 == 2


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
