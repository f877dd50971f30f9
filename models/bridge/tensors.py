"""Where each parameter of transformers' module is in a published checkpoint: its table of conversions, followed backwards on
tensors without values."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.core_model_loading import revert_weight_conversion

from models.bridge.graph import Parameter, Refused, Source
from models.bridge.stand_ins import parameters


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of a parameter: one entry of its first axis or all, rows from `start` or all, turned or not."""

    name: str
    entry: int | None = None
    start: int = 0
    turned: bool = False


class _Follower(TorchDispatchMode):
    """Of every tensor that is made, which part of which parameter it is; or which parts one behind the other."""

    def __init__(self, named: dict[int, tuple[_Part, ...]]) -> None:
        super().__init__()
        self.of, self._alive = named, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outs = list(out) if isinstance(out, list | tuple) else [out]
        self._alive += outs
        name, source = func.name().split("::")[1].split(".")[0], args[0]
        if name in ("cat", "stack"):
            found = [self.of.get(id(one)) for one in source]
            axis = args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)
            if name == "cat" and axis == 0 and all(found):
                self.of[id(out)] = tuple(part for parts in found for part in parts or ())
            return out
        parts = self.of.get(id(source)) if isinstance(source, torch.Tensor) else None
        if parts is None or len(parts) != 1:
            return out
        for index, one in enumerate(outs):
            made = _made(name, parts[0], source, one, index, args, kwargs or {})
            if made is not None:
                self.of[id(one)] = (made,)
        return out


_SAME = ("clone", "contiguous", "alias", "detach", "_to_copy")


def _made(
    name: str, part: _Part, source: torch.Tensor, out: torch.Tensor, index: int, args: Any, kwargs: Any
) -> _Part | None:
    """The part that a tensor is which `name` made of another one; None where that is no such thing."""
    axis = _axis(args[2] if name.startswith("split") and len(args) > 2 else args[1] if len(args) > 1 else 0, source)
    if name.startswith("split"):
        axis = _axis(kwargs.get("dim", args[2] if len(args) > 2 else 0), source)
        sizes = args[1] if isinstance(args[1], list | tuple) else [args[1]] * (index + 1)
        if axis == 0 and source.dim() == 3 and out.shape[0] == 1 and part.entry is None:
            return dataclasses.replace(part, entry=index)  # one of a stack, which keeps its axis until it is squeezed
        return _from(part, source, axis, sum(sizes[:index]))
    if name in _SAME or (name == "squeeze" and source.dim() == 3):
        return part
    if name in ("select", "unbind"):
        entry = args[2] if name == "select" else index
        return dataclasses.replace(part, entry=entry) if axis == 0 and part.entry is None else None
    if name == "slice":
        return _from(part, source, axis, args[2] if len(args) > 2 and args[2] else 0)
    if name in ("transpose", "t", "mT"):
        axes = {source.dim() - 1, source.dim() - 2}
        given = axes if name != "transpose" else {_axis(args[1], source), _axis(args[2], source)}
        return dataclasses.replace(part, turned=not part.turned) if given == axes else None
    return None


def _from(part: _Part, source: torch.Tensor, axis: int, start: int) -> _Part | None:
    rows = source.dim() - (1 if part.turned else 2) if source.dim() > 1 else 0
    return dataclasses.replace(part, start=part.start + start) if axis == rows else None


def _axis(axis: Any, tensor: torch.Tensor) -> int:
    return axis % max(1, tensor.dim()) if isinstance(axis, int) else 0


def published(model: Any, fake: FakeTensorMode) -> dict[str, Parameter]:
    """Each parameter, and what checkpoints call its parts.

    Raises:
        Refused: a parameter is made of other numbers than a checkpoint has.
    """
    own = dict(parameters(model))
    plan = _plan(model)
    follower = _Follower({id(tensor): (_Part(name),) for name, tensor in own.items()})
    with torch.no_grad(), fake, follower:
        reverted = revert_weight_conversion(model, dict(own))
    found: dict[str, list[tuple[_Part, Source]]] = {name: [] for name in own}
    for tensor_name, tensor in reverted.items():
        parts = follower.of.get(id(tensor))
        if parts is None:
            raise Refused(f"the checkpoint's {tensor_name} is made of its weights in a way that cannot be followed")
        whole, first = tuple(tensor.shape), 0
        for part in parts:
            rows = None
            if len(parts) > 1:
                rows = (first, first + own[part.name].shape[0])
                first = rows[1]
            found[part.name].append((part, Source(tensor_name, whole, part.turned, rows)))
    return {name: _parameter(name, tuple(own[name].shape), given, plan) for name, given in found.items()}


def _parameter(name: str, shape: tuple[int, ...], given: list[tuple[_Part, Source]], plan: dict[str, str]) -> Parameter:
    entries = sorted({-1 if part.entry is None else part.entry for part, _ in given})
    stacked = entries != [-1]
    if not given or (stacked and entries != list(range(shape[0]))):
        raise Refused(f"its weight {name} is in no checkpoint")
    by_entry: dict[int, list[tuple[int, Source]]] = {entry: [] for entry in entries}
    for part, source in given:
        by_entry[-1 if part.entry is None else part.entry].append((part.start, source))
    sources = tuple(tuple(source for _, source in sorted(by_entry[entry], key=lambda one: one[0])) for entry in entries)
    return Parameter(shape, sources, stacked, plan.get(_starred(name.rpartition(".")[0])) or plan.get(_starred(name)))


def _plan(model: Any) -> dict[str, str]:
    """Module (numbers starred) -> which axis of its weight a mesh cuts."""
    cut = {"colwise": "rows", "rowwise": "columns", "colwise_gather_output": "rows", "packed_colwise": "rows"}
    plan = getattr(model, "tp_plan", None) or {}
    return {name: cut[how] for name, how in plan.items() if how in cut}


def _starred(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
