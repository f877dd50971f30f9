"""A trace's weights as modules of ours, and the recipes of their parameters."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
from flax import nnx

from models.bridge.graph import Function, Held, Node, Parameter, Ref, Refused, Source, Trace
from models.config import ModelConfig, MoEConfig
from models.layers import Build, Embedding, Linear, weight
from models.layers.moe import Experts
from models.recipes import Piece, Recipe, Rows, Stack, deal, split

ELSEWHERE = ("bias", "experts_down")
"""Kinds of weights that the module of another one has."""


class Plain(nnx.Module):
    """A parameter that is used as an array."""

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self.weight = weight(shape, dtype, (None,) * len(shape))


class ExactLinear(Linear):
    """A product that no scheme rounds: a router's."""

    exact = True


def uses(trace: Trace) -> dict[str, Held]:
    """How the model uses each of its weights, in the order of first use.

    Raises:
        Refused: calls use one in ways that do not go together.
    """
    found: dict[str, Held] = {}
    for call in (*trace.hidden.calls, *trace.logits.calls):
        for name, held in zip(call.weights, trace.functions[call.function].held, strict=True):
            before = found.get(name, held)
            kinds = {before.kind, held.kind}
            if len(kinds) > 1 and kinds & set(ELSEWHERE):
                raise Refused(f"it uses {name} in several ways")
            kind = held.kind if len(kinds) == 1 else "table" if kinds == {"table", "linear"} else "plain"
            found[name] = dataclasses.replace(before, kind=kind)
    return found


def head_of(trace: Trace) -> str | None:
    """The weight of the last product before logits, where it is a product's alone."""
    found = None
    for call in trace.logits.calls:
        function = trace.functions[call.function]
        for node in _nodes(function, "jaxserve.linear"):
            held = _held(function, call.weights, node.args[1])
            found = held[0] if held is not None and held[1].kind == "linear" else None
    return found


def make(name: str, held: Held, trace: Trace, config: ModelConfig, build: Build, is_head: bool) -> Any:
    """The module of a weight."""
    if held.kind == "experts":
        E, J, D = held.shape
        node, _ = _node_of(trace, name, "jaxserve.experts", 3)
        activation = json.loads(node.args[5])["activation"]
        moe = MoEConfig(E, 1, J // 2, (True,) * config.num_layers)
        return Experts(dataclasses.replace(config, activation=activation, embed_dim=D), moe, build)
    if held.kind == "table":
        rows, width = held.shape
        return Embedding(rows, width, build)
    if held.kind != "linear":
        return Plain(held.shape, jnp.float32 if len(held.shape) < 2 else build.compute_dtype)
    (O, I), axis = held.shape, trace.parameters[name].axis
    axes: tuple[str | None, str | None] = (None, "embed")
    if is_head:
        axes = (build.axis("vocab", O), "embed")
    elif axis == "rows":
        axes = (build.axis("ffw", O), "embed")
    elif axis == "columns":
        axes = ("embed", build.axis("ffw", I))
    return (ExactLinear if held.exact else Linear)(I, O, build, axes, bias=bias_of(trace, name) is not None)


def bias_of(trace: Trace, name: str) -> str | None:
    """The parameter that a weight's product adds, where it does nothing else.

    Raises:
        Refused: it adds several.
    """
    found = set()
    for call in (*trace.hidden.calls, *trace.logits.calls):
        if name not in call.weights:
            continue
        function = trace.functions[call.function]
        for node in _nodes(function, "jaxserve.linear"):
            product, bias = (_held(function, call.weights, argument) for argument in node.args[1:3])
            if product is not None and product[0] == name:
                found.add(bias[0] if bias is not None and bias[1].kind == "bias" else None)
    if len(found) > 1:
        raise Refused(f"its products with {name} add several biases")
    return next(iter(found), None)


def down_of(trace: Trace, name: str) -> str:
    """The second weight of experts whose first it is."""
    node, held = _node_of(trace, name, "jaxserve.experts", 3)
    function, weights = held
    found = _held(function, weights, node.args[4])
    assert found is not None
    return found[0]


def _node_of(trace: Trace, name: str, op: str, place: int) -> tuple[Node, tuple[Function, tuple[str, ...]]]:
    for call in (*trace.hidden.calls, *trace.logits.calls):
        function = trace.functions[call.function]
        for node in _nodes(function, op):
            held = _held(function, call.weights, node.args[place])
            if held is not None and held[0] == name:
                return node, (function, call.weights)
    raise AssertionError(f"nothing uses {name}")


def _nodes(function: Function, op: str) -> list[Node]:
    return [node for node in function.nodes if node.op == op]


def _held(function: Function, weights: tuple[str, ...], argument: Any) -> tuple[str, Held] | None:
    """(name, use) of the weight that an argument is."""
    place = argument.value - function.inputs if isinstance(argument, Ref) else -1
    return (weights[place], function.held[place]) if 0 <= place < len(weights) else None


def recipe(parameter: Parameter) -> Recipe:
    """How a parameter is made."""
    entries = [_joined(sources) for sources in parameter.sources]
    return Stack(tuple(entries)) if parameter.stacked else entries[0]


def gate_up_recipe(parameter: Parameter, shards: int) -> Recipe:
    """How the first weights of experts [E, 2 F, D] are made, gate and up dealt in `shards` parts (see `GatedMLP`)."""
    E, J, _ = parameter.shape
    if shards == 1:
        return recipe(parameter)
    if not parameter.stacked:
        return deal(E * shards, *split(recipe(parameter), J // 2, J // 2))
    both = [recipe(dataclasses.replace(parameter, sources=(one,), stacked=False)) for one in parameter.sources]
    return Stack(tuple(deal(shards, *split(one, J // 2, J // 2)) for one in both))


def _joined(sources: tuple[Source, ...]) -> Recipe:
    pieces = [_piece(source) for source in sources]
    return pieces[0] if len(pieces) == 1 else deal(1, *pieces)


def _piece(source: Source) -> Recipe:
    piece = Piece(source.tensor, source.shape, source.turned)
    return piece if source.rows is None else Rows(piece, *source.rows)
