"""How products of a recorded model are cut over a mesh where transformers' plan says nothing of them.

A product of what every device has whole is cut by its rows, and what it gives is cut; a product of that is cut by its columns, and
what it gives is whole again: Megatron's pairs (Shoeybi et al. 2019, arXiv:1909.08053), found by following the values. Whatever is
done in between, XLA does it on cut values or brings them together: a plan decides speed and memory, never results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from models.bridge.graph import Call, Function, Parameter, Ref


def planned(
    parameters: Mapping[str, Parameter], functions: Sequence[Function], calls: Sequence[Call]
) -> dict[str, Parameter]:
    """The parameters, with an axis for every product that has none yet. Routers stay whole."""
    found: dict[str, str] = {}
    for call in calls:
        found |= _of(functions[call.function], call.weights, parameters)
    return {
        name: dataclasses.replace(one, axis=found[name]) if one.axis is None and name in found else one
        for name, one in parameters.items()
    }


def _of(function: Function, weights: Sequence[str], parameters: Mapping[str, Parameter]) -> dict[str, str]:
    """Weight -> axis, of one function's products."""
    out: dict[str, str] = {}
    cut: set[int] = set()
    for node in function.nodes:
        given = _values(node.args) | _values(node.kwargs)
        if node.op != "jaxserve.linear":
            if given & cut and node.op != "jaxserve.experts":
                cut |= set(node.outs)
            continue
        place = node.args[1].value - function.inputs if isinstance(node.args[1], Ref) else -1
        if not 0 <= place < len(weights) or function.held[place].kind != "linear" or function.held[place].exact:
            continue
        axis = parameters[weights[place]].axis or ("columns" if _values(node.args[0]) & cut else "rows")
        out[weights[place]] = axis
        if axis == "rows":
            cut |= set(node.outs)
    return out


def _values(argument: Any) -> set[int]:
    if isinstance(argument, tuple):
        return {value for part in argument for value in _values(part)}
    return {argument.value} if isinstance(argument, Ref) else set()
