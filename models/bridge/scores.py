"""What a model does to its scores before their softmax, found out by numbers in their place."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from models.bridge.graph import Refused
from models.bridge.record import RawNode, Recording, Value
from models.bridge.record import options as as_options

HIDDEN = 5_000.0
"""A score that lies so far below its row's largest counts for nothing: openai-gpt hides by 10,000, others by the least number."""
_SHAPED = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
"""What takes a tensor for its shape alone."""


@dataclasses.dataclass(frozen=True)
class Said:
    """What becomes of scores: `scale * s + slope * position of the key`, of the keys that are seen.

    Attributes:
        slopes: of each head; None where nothing is added.
    """

    scale: float
    window: int | None
    chunk: int | None
    slopes: tuple[float, ...] | None

    def options(self, **own: Any) -> str:
        """As attention is told."""
        told = {"scale": self.scale, "window": self.window, "chunk": self.chunk, "slopes": self.slopes, "softcap": None}
        return as_options(**(told | {name: value for name, value in own.items() if value is not None}))


class Graph:
    """The operations that make a softmax's scores (or a mask) of a product and of what does not depend on tokens.

    Attributes:
        product: the node of the product of queries and keys; None for a mask.
        key: equal for graphs that compute the same.
        masks: what our masks in it say.
    Raises:
        Refused: it depends on tokens or weights in another way.
    """

    def __init__(self, recording: Recording, made: Mapping[int, int], value: int, product: bool = True) -> None:
        self.recording, self.value, self.product = recording, value, None
        self.tokens = recording.shapes[recording.inputs[0]][1]
        self.nodes: list[int] = []
        self.masks: list[dict[str, Any]] = []
        seen, waiting = set(), [value]
        while waiting:
            one = waiting.pop()
            index = made.get(one)
            if one in seen:
                continue
            seen.add(one)
            if index is None:
                if one not in recording.constants and one != recording.inputs[1]:
                    raise Refused("its attention adds to the scores what depends on tokens or weights")
                continue
            self.nodes.append(index)
            waiting += self._before(recording.nodes[index], index)
        if product and self.product is None:
            raise Refused("it makes weights of attention of something else than queries and keys")
        self.nodes = sorted(set(self.nodes))
        self.key = self._key()

    def _before(self, node: RawNode, index: int) -> list[int]:
        """The values that a node needs, apart from a product's factors."""
        shape = self.recording.shapes[node.outs[0]]
        if node.op in ("aten.bmm", "aten.baddbmm") and shape[-2:] == (self.tokens, self.tokens):
            if self.product not in (None, index):
                raise Refused("its attention adds several products")
            self.product = index
            return refs(node)[:1] if node.op == "aten.baddbmm" else []
        if node.op == "jaxserve.mask":
            self.masks.append(json.loads(node.args[1]))
            return []
        if node.op.startswith("jaxserve."):
            raise Refused("its attention adds to the scores what depends on tokens or weights")
        return [] if _shaped(node) else refs(node)

    def _key(self) -> Any:
        number = {
            out: (place, at)
            for place, index in enumerate(self.nodes)
            for at, out in enumerate(self.recording.nodes[index].outs)
        }

        def plain(argument: Any) -> Any:
            if isinstance(argument, tuple):
                return tuple(plain(part) for part in argument)
            if not isinstance(argument, Value):
                return argument
            if argument.number in number:
                return ("v", *number[argument.number])
            array = self.recording.constants.get(argument.number)
            return "given" if array is None else hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()

        nodes = (self.recording.nodes[index] for index in self.nodes)
        return tuple(
            (node.op, plain(node.args), plain(node.kwargs), self.recording.shapes[node.outs[0]]) for node in nodes
        )

    def computed(self, product: float | torch.Tensor) -> np.ndarray:
        """Scores [H, T, T] (or [1, T, T]) float32 of numbers in the product's place."""
        last = {value: index for index in self.nodes for value in refs(self.recording.nodes[index])}
        values: dict[int, Any] = {}
        with _disable_current_modes(), torch.no_grad():
            for index in self.nodes:
                node = self.recording.nodes[index]
                outs = self._compute(node, index, values, product)
                values |= zip(node.outs, outs if isinstance(outs, tuple | list) else (outs,), strict=True)
                for value in refs(node):
                    if last[value] == index and value != self.value:
                        values.pop(value, None)
            out = values[self.value]
            out = torch.where(out, 0.0, -1e30) if out.dtype == torch.bool else out.float()
            return out.reshape(-1, *out.shape[-2:]).expand(-1, self.tokens, self.tokens).clamp(-1e30, 1e30).numpy()

    def _compute(self, node: RawNode, index: int, values: Mapping[int, Any], product: float | torch.Tensor) -> Any:
        if index == self.product:
            shape = self.recording.shapes[node.outs[0]]
            s = product.expand(shape) if isinstance(product, torch.Tensor) else torch.full(shape, product)
            if node.op == "aten.bmm":
                return s
            named = dict(node.kwargs)
            return named.get("beta", 1) * self._given(node.args[0], values) + named.get("alpha", 1) * s
        if node.op == "jaxserve.mask":
            told = json.loads(node.args[1])
            seen = seen_by(self.tokens, told["window"], told["chunk"])
            return torch.where(torch.from_numpy(seen), 0.0, torch.finfo(torch.float32).min)[None, None]
        if _shaped(node):
            first = torch.empty(self.recording.shapes[node.args[0].number])
            return _operation(node.op)(
                first, *(self._given(a, values) for a in node.args[1:]), **self._named(node, values)
            )
        return _operation(node.op)(*(self._given(a, values) for a in node.args), **self._named(node, values))

    def _named(self, node: RawNode, values: Mapping[int, Any]) -> dict[str, Any]:
        return {name: self._given(value, values) for name, value in node.kwargs}

    def _given(self, argument: Any, values: Mapping[int, Any]) -> Any:
        if isinstance(argument, tuple):
            return [self._given(part, values) for part in argument]
        if isinstance(argument, str) and argument.startswith("torch."):
            return getattr(torch, argument.removeprefix("torch."))
        if not isinstance(argument, Value):
            return argument
        if argument.number in values:
            return values[argument.number]
        array = self.recording.constants.get(argument.number)
        return torch.arange(self.tokens)[None] if array is None else torch.from_numpy(np.array(array))


def _operation(name: str) -> Any:
    space, base, *overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, space), base), overload[0] if overload else "default")


def _shaped(node: RawNode) -> bool:
    return node.op.split(".")[1] in _SHAPED


def refs(node: RawNode) -> list[int]:
    """The values that a node needs, in order."""
    out: list[int] = []

    def walk(argument: Any) -> None:
        if isinstance(argument, tuple):
            for part in argument:
                walk(part)
        elif isinstance(argument, Value):
            out.append(argument.number)

    walk(node.args)
    walk(tuple(value for _, value in node.kwargs))
    return out


def seen_by(tokens: int, window: int | None, chunk: int | None) -> np.ndarray:
    """Which keys [T, T] each token sees."""
    q, k = np.arange(tokens)[:, None], np.arange(tokens)[None]
    seen = k <= q
    if window is not None:
        seen = seen & (q - k < window)
    return seen if chunk is None else seen & (q // chunk == k // chunk)


def read(graph: Graph) -> Said:
    """What a graph does to scores.

    Raises:
        Refused: something that attention over pages does not.
    """
    zero = graph.computed(0.0)
    seen_HTT = zero > zero.max(-1, keepdims=True) - HIDDEN
    window, chunk = _limits(graph, seen_HTT)
    seen = seen_HTT[0]
    tolerance = 1e-4 * max(1.0, float(np.abs(zero[:, seen]).max()))
    scale = 1.0
    if graph.product is not None:
        nearest = np.unravel_index(np.argmin(np.where(seen, np.abs(zero[0]), np.inf)), seen.shape)
        scale = float(graph.computed(1.0)[0][nearest] - zero[0][nearest])
        other = torch.linspace(-3.0, 3.0, graph.tokens)
        line = zero + scale * other.numpy()
        if np.abs(graph.computed(other) - line)[:, seen].max() > tolerance + 1e-4:
            raise Refused("its attention does something else to the scores than to scale and to mask them")
    return Said(scale, window, chunk, _slopes(zero, seen, tolerance))


def _limits(graph: Graph, seen_HTT: np.ndarray) -> tuple[int | None, int | None]:
    """The window and the piece that a token sees."""
    width = int(seen_HTT[0, -1].sum())
    told = {(mask["window"], mask["chunk"]) for mask in graph.masks} | {
        (None if width == graph.tokens else width, None)
    }
    for window, chunk in sorted(
        told, key=lambda one: one == (None, None)
    ):  # a mask of ours knows of windows beyond these tokens
        if (seen_HTT == seen_by(graph.tokens, window, chunk)).all():
            return window, chunk
    raise Refused("its attention sees other positions than those before a token, or those in a window")


def _slopes(zero_HTT: np.ndarray, seen: np.ndarray, tolerance: float) -> tuple[float, ...] | None:
    """How much each head adds a position."""
    T = seen.shape[0]
    first = int(np.argmax(seen[-1]))
    if first == T - 1:
        return None
    slopes = (zero_HTT[:, -1, -1] - zero_HTT[:, -1, first]) / (T - 1 - first)
    distance = np.arange(T)[None] - np.arange(T)[:, None]
    line = slopes[:, None, None] * distance + np.einsum("hii->hi", zero_HTT)[..., None]
    if np.abs(zero_HTT - line)[:, seen].max() > tolerance:
        raise Refused("its attention adds something else to the scores than a multiple of the distance")
    return tuple(float(slope) for slope in slopes) if np.abs(slopes).max() * T > tolerance else None
