"""What was recorded of a model, as data: functions of tensors, which layers share, and the order in which they are called.

No torch and no jax: whoever records writes it, whoever computes reads it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


class Refused(ValueError):  # noqa: N818  a refusal is a sentence for a person
    """The model cannot be served this way; the message says why, behind "transformers' code of X: "."""


@dataclasses.dataclass(frozen=True)
class Ref:
    """A value of a function, by its number."""

    value: int


@dataclasses.dataclass(frozen=True)
class Length:
    """A whole number that depends on how many tokens there are: slope * T + offset."""

    slope: int
    offset: int


Argument = Any
"""None, a bool, a number, a string, a `Ref`, a `Length`, or a tuple of these."""


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        op: its name: torch's ("aten.add.Tensor"), or one of ours ("jaxserve.attend").
        args, kwargs: as it was called.
        outs: numbers of the values that it gives.
    """

    op: str
    args: tuple[Argument, ...]
    kwargs: tuple[tuple[str, Argument], ...]
    outs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Held:
    """A weight that a function is given.

    Attributes:
        kind: how it is used: "linear" (by products alone), "table" (looked up, and for logits), "experts" (of stacked blocks,
            which take two weights: this one is gate and up, or down), or "plain".
        name: its place in the layer, or in the model where it is no layer's.
        shape: of the parameter.
        exact: it is a router, or something as small: it is never rounded.
        bias: whether the product adds a bias, which is the next weight.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    exact: bool = False


@dataclasses.dataclass(frozen=True)
class Attends:
    """One attention of a function: what it keeps of each position, and how it scores.

    Attributes:
        kv_heads, head_dim, v_head_dim: of what pages keep.
        window: how far back it sees, itself included; None for all.
        chunk: positions see those of their own piece alone; None for no such limit.
        slopes: what a head adds to a score for every position of the key (one, or one a head); None for nothing. Pages then keep
            two numbers more of each key, which are its position.
    """

    kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    chunk: int | None = None
    slopes: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.slopes is not None:
            object.__setattr__(self, "slopes", tuple(self.slopes))


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """Operations in order. Values are numbered: first what it is given, then weights, then constants, then results.

    Functions are equal where they compute the same, so that programs have them once.

    Attributes:
        inputs: how many values it is given.
        held: its weights.
        constants: arrays that are the same for every call.
        outputs: numbers of what it gives.
        attends: its attentions, in the order in which nodes number them.
        digest: of all that.
    """

    inputs: int
    held: tuple[Held, ...]
    constants: tuple[np.ndarray, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    attends: tuple[Attends, ...]
    digest: str = ""

    def __post_init__(self) -> None:
        if not self.digest:
            text = json.dumps(_plain(self), sort_keys=True)
            h = hashlib.sha256(text.encode())
            for array in self.constants:
                h.update(np.ascontiguousarray(array).tobytes())
            object.__setattr__(self, "digest", h.hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Function) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclasses.dataclass(frozen=True)
class Call:
    """A function at work.

    Attributes:
        function: which of the trace's.
        inputs, outputs: numbers of values of the model.
        weights: of each of the function's weights, the parameter's name.
    """

    function: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    weights: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """Calls in order.

    Attributes:
        inputs: numbers of the values that it is given: tokens and positions, or hidden states.
        output: the number of what it gives: hidden states [1, T, D], or logits [1, R, V].
    """

    calls: tuple[Call, ...]
    inputs: tuple[int, ...]
    output: int


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a part of a parameter is in a checkpoint.

    Attributes:
        tensor: its published name.
        shape: as published.
        turned: it is stored [in, out].
        rows: (first, behind the last) of the tensor's rows that are meant; None for all.
    """

    tensor: str
    shape: tuple[int, ...]
    turned: bool = False
    rows: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of transformers' module.

    Attributes:
        sources: by entry of its first axis (one entry where it is whole), the tensors whose rows it has one behind the other.
        stacked: whether there is an entry for each of its first axis.
        axis: "rows" where a mesh cuts its rows (the first axis of a matrix), "columns", or None.
    """

    shape: tuple[int, ...]
    sources: tuple[tuple[Source, ...], ...]
    stacked: bool = False
    axis: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """A model as it was recorded.

    Attributes:
        facts: numbers of the model for whoever serves it: "vocab_size", "num_layers", ...
        functions: what calls call.
        hidden: from tokens and positions to hidden states.
        logits: from hidden states to logits.
        parameters: by their names in transformers' module.
    """

    facts: Mapping[str, Any]
    functions: tuple[Function, ...]
    hidden: Program
    logits: Program
    parameters: Mapping[str, Parameter]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trace) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @functools.cached_property
    def digest(self) -> str:
        """Of all that it says."""
        calls = json.dumps([_plain(self.facts), _plain(self.hidden), _plain(self.logits), _plain(self.parameters)])
        return hashlib.sha256("".join([calls, *(f.digest for f in self.functions)]).encode()).hexdigest()

    def to_bytes(self) -> bytes:
        """For a file."""
        arrays: dict[str, np.ndarray] = {}
        functions = []
        for f, function in enumerate(self.functions):
            functions.append(_plain(function))
            for c, array in enumerate(function.constants):
                arrays[f"{f}.{c}"] = array
        said = {
            "facts": _plain(self.facts),
            "functions": functions,
            "hidden": _plain(self.hidden),
            "logits": _plain(self.logits),
            "parameters": _plain(self.parameters),
        }
        arrays["said"] = np.frombuffer(json.dumps(said).encode(), np.uint8)
        out = io.BytesIO()
        np.savez_compressed(out, **arrays)  # pyright: ignore[reportArgumentType]
        return out.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Trace:
        """The other way round.

        Raises:
            ValueError, KeyError, OSError, zipfile.BadZipFile: it is none.
        """
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            said = json.loads(arrays["said"].tobytes())
            functions = tuple(
                Function(
                    told["inputs"],
                    tuple(Held(h["kind"], h["name"], tuple(h["shape"]), h["exact"]) for h in told["held"]),
                    tuple(arrays[f"{f}.{c}"] for c in range(told["constants"])),
                    tuple(_node(node) for node in told["nodes"]),
                    tuple(told["outputs"]),
                    tuple(Attends(**one) for one in told["attends"]),
                    told["digest"],
                )
                for f, told in enumerate(said["functions"])
            )
        parameters = {name: _parameter(told) for name, told in said["parameters"].items()}
        return cls(
            _back(said["facts"]),
            functions,
            _program(said["hidden"]),
            _program(said["logits"]),
            parameters,
        )


def run(function: Function, values: list[Any], compute: Callable[[Node, list[Any]], tuple[Any, ...]]) -> list[Any]:
    """What a function gives.

    Args:
        values: what it is given, then its weights, then its constants.
        compute: (node, values by number) -> the node's results.
    """
    table = list(values)
    for node in function.nodes:
        given = compute(node, table)
        for out, value in zip(node.outs, given, strict=True):
            assert out == len(table)
            table.append(value)
    return [table[out] for out in function.outputs]


def mapped(argument: Argument, change: Callable[[Any], Any]) -> Argument:
    """An argument with its leaves changed."""
    if isinstance(argument, tuple):
        return tuple(mapped(part, change) for part in argument)
    return change(argument)


def _plain(value: Any) -> Any:
    """As JSON has it. Nothing in a trace is a dictionary with one of these keys."""
    if isinstance(value, Ref):
        return {"v": value.value}
    if isinstance(value, Length):
        return {"T": [value.slope, value.offset]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"f": str(value)}
    if isinstance(value, Function):
        told = {
            name: _plain(getattr(value, name)) for name in ("inputs", "held", "nodes", "outputs", "attends", "digest")
        }
        return told | {"constants": len(value.constants)}
    if isinstance(value, Node):
        return [value.op, _plain(value.args), _plain(value.kwargs), list(value.outs)]
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value


def _back(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_back(part) for part in value)
    if isinstance(value, dict):
        if value.keys() == {"v"}:
            return Ref(value["v"])
        if value.keys() == {"T"}:
            return Length(*value["T"])
        if value.keys() == {"f"}:
            return float(value["f"])
        return {name: _back(part) for name, part in value.items()}
    return value


def _node(told: list[Any]) -> Node:
    op, args, kwargs, outs = told
    return Node(op, _back(args), _back(kwargs), tuple(outs))


def _program(told: Mapping[str, Any]) -> Program:
    calls = tuple(
        Call(call["function"], tuple(call["inputs"]), tuple(call["outputs"]), tuple(call["weights"]))
        for call in told["calls"]
    )
    return Program(calls, tuple(told["inputs"]), told["output"])


def _parameter(told: Mapping[str, Any]) -> Parameter:
    sources = tuple(
        tuple(
            Source(one["tensor"], tuple(one["shape"]), one["turned"], tuple(one["rows"]) if one["rows"] else None)
            for one in entry
        )
        for entry in told["sources"]
    )
    return Parameter(tuple(told["shape"]), sources, told["stacked"], told["axis"])
