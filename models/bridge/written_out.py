"""Attention that a model computes itself, product by product, found in recordings and made ours.

What stands between the scores and their softmax is computed once with numbers in the scores' place. If that scales them, hides
positions that lie behind a token or before its window, and adds a multiple of the distance, attention over pages can do the same
(`scores.py`); the scores of all tokens with all tokens are then nobody's, and are left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from models.bridge import scores
from models.bridge.graph import Refused
from models.bridge.record import RawNode, Recording, Value

_SAME = {
    "aten.view", "aten._unsafe_view", "aten.reshape", "aten.expand", "aten.clone", "aten.alias", "aten.detach", "aten._to_copy",
    "aten.unsqueeze", "aten.squeeze", "aten.squeeze.dims", "aten.squeeze.dim", "aten.dropout", "aten.contiguous",
}  # fmt: skip
"""What leaves numbers as they are, one for one."""


def found(recording: Recording) -> list[tuple[int, int]]:
    """(the softmax's node, the node of the product with values) of every softmax over all tokens of all tokens.

    Raises:
        Refused: one is not in front of such a product.
    """
    tokens, shapes = recording.shapes[recording.inputs[0]][1], recording.shapes
    softmaxes = [
        index
        for index, node in enumerate(recording.nodes)
        if node.op in ("aten._softmax", "aten._safe_softmax") and shapes[node.outs[0]][-2:] == (tokens, tokens)
    ]
    if not softmaxes:
        return []
    users: dict[int, list[int]] = {}
    for index, node in enumerate(recording.nodes):
        for value in scores.refs(node):
            users.setdefault(value, []).append(index)
    return [(index, _product_behind(recording, users, recording.nodes[index].outs[0])) for index in softmaxes]


def written_out(recording: Recording) -> bool:
    """Whether it computes scores, or makes masks, itself."""
    masked = any(node.op == "jaxserve.attend" and node.args[5] is not None for node in recording.nodes)
    return masked or bool(found(recording))


def masked_by_us(recording: Recording) -> bool:
    """Whether a mask of ours is used as a tensor: it says its window."""
    return any(node.op == "jaxserve.mask" for node in recording.nodes)


def replaced(recordings: Sequence[Recording]) -> list[Recording]:
    """The recordings, the longest last, with attention of ours in the place of theirs.

    Raises:
        Refused: what one does to its scores pages cannot do.
    """
    long = recordings[-1]
    made = {node: index for index, one in enumerate(long.nodes) for node in one.outs}
    known: dict[Any, scores.Said] = {}
    told: dict[int, tuple[str, int | None]] = {}  # node -> what attention is told, and the product of scores
    for softmax, product in found(long):
        graph = scores.Graph(long, made, long.nodes[softmax].args[0].number)
        told[product] = (_said(graph, known).options(), graph.product)
    for index, node in enumerate(long.nodes):
        if node.op == "jaxserve.attend" and node.args[5] is not None:
            said = _said(scores.Graph(long, made, node.args[5].number, product=False), known)
            own = json.loads(node.args[4])
            if own["window"] is not None and said.window not in (None, own["window"]):
                raise Refused("its mask and its attention have different windows")
            told[index] = (said.options(scale=own["scale"], softcap=own["softcap"], window=own["window"]), None)
    if any([node.op for node in one.nodes] != [node.op for node in long.nodes] for one in recordings):
        raise Refused("it computes something else for more tokens")
    out = [_with(one, told) for one in recordings] if told else list(recordings)
    _nothing_left(out[-1])
    return out


def _said(graph: scores.Graph, known: dict[Any, scores.Said]) -> scores.Said:
    if graph.key not in known:
        known[graph.key] = scores.read(graph)
    return known[graph.key]


def _product_behind(recording: Recording, users: Mapping[int, Sequence[int]], value: int) -> int:
    """The product that takes a softmax's result on its left."""
    products, waiting = set(), [value]
    while waiting:
        one = waiting.pop()
        for index in users.get(one, ()):
            node = recording.nodes[index]
            if node.op == "aten.bmm" and node.args[0] == Value(one):
                products.add(index)
            elif node.op in _SAME:
                waiting.append(node.outs[0])
            else:
                products.add(-1)
    if len(products) != 1 or -1 in products:
        raise Refused("it does something else with the weights of attention than to take values by them")
    return products.pop()


def _with(recording: Recording, told: dict[int, tuple[str, int | None]]) -> Recording:
    """A recording with the attention that was found in the longest one."""
    nodes: list[RawNode] = []
    moved: list[int] = []  # where each node is now
    shapes = dict(recording.shapes)
    positions = Value(recording.inputs[1])

    def new(op: str, args: tuple[Any, ...], shape: tuple[int, ...]) -> Value:
        number = len(shapes)
        shapes[number] = shape
        nodes.append(RawNode(op, args, (), (number,)))
        return Value(number)

    for index, node in enumerate(recording.nodes):
        moved.append(len(nodes))
        if index not in told:
            nodes.append(node)
            continue
        said, product = told[index]
        where = positions if json.loads(said)["slopes"] is not None else None
        if product is None:
            nodes.append(dataclasses.replace(node, args=(*node.args[:4], said, where)))
            continue
        q, k_turned = recording.nodes[product].args[-2:]
        v = node.args[1]
        (H, T, h), width = shapes[q.number], shapes[v.number][-1]
        k = new("aten.permute", (k_turned, (0, 2, 1)), (H, T, h))
        q, k, v = (
            new("aten.unsqueeze", (one, 0), (1, *shape))
            for one, shape in ((q, (H, T, h)), (k, (H, T, h)), (v, (H, T, width)))
        )
        out = new("jaxserve.attend", (q, k, v, None, said, where), (1, T, H, width))
        turned = new("aten.permute", (out, (0, 2, 1, 3)), (1, H, T, width))
        nodes.append(RawNode("aten.squeeze.dims", (turned, (0,)), (), node.outs))
    moved.append(len(nodes))
    marks = [(name, moved[begin], moved[end]) for name, begin, end in recording.marks]
    return dataclasses.replace(recording, nodes=nodes, shapes=shapes, marks=marks)


def _nothing_left(recording: Recording) -> None:
    """Raises where a mask of ours still decides something."""
    by_value = {out: node for node in recording.nodes for out in node.outs}
    waiting, seen = [recording.output], set()
    while waiting:
        value = waiting.pop()
        node = by_value.get(value)
        if value in seen or node is None:
            continue
        seen.add(value)
        if node.op == "jaxserve.mask":
            raise Refused("its layers change the mask of attention themselves")
        waiting += scores.refs(node)
