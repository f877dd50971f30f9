"""Records what torch's code computes of tensors that have shapes and no values."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from models.bridge.graph import Refused

MAX_CONSTANT_BYTES = 16 << 20

_ours = torch.library.Library("jaxserve", "DEF")
_ours.define("linear(Tensor x, Tensor w, Tensor? b) -> Tensor")
_ours.define("attend(Tensor q, Tensor k, Tensor v, Tensor? sinks, str options, Tensor? mask) -> Tensor")
_ours.define("mask(Tensor like, str options) -> Tensor")
_ours.define("experts(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Tensor down, str options) -> Tensor")


@torch.library.register_fake("jaxserve::linear", lib=_ours)
def _linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


@torch.library.register_fake("jaxserve::attend", lib=_ours)
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    options: str,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    batch, heads, tokens, _ = q.shape
    return q.new_empty((batch, tokens, heads, v.shape[-1]))


@torch.library.register_fake("jaxserve::mask", lib=_ours)
def _mask(like: torch.Tensor, options: str) -> torch.Tensor:
    return like.new_empty((1, 1, like.shape[1], like.shape[1]))


@torch.library.register_fake("jaxserve::experts", lib=_ours)
def _experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, options: str
) -> torch.Tensor:
    return torch.empty_like(x)


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor of a recording, by its number."""

    number: int


@dataclasses.dataclass
class RawNode:
    """An operation as it was recorded: whole numbers are those of this length."""

    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outs: tuple[int, ...]


@dataclasses.dataclass
class Recording:
    """What was computed of one number of tokens.

    Attributes:
        inputs: values that were given.
        weights: value -> the parameter's name.
        constants: value -> array.
        nodes: in order.
        output: the value that was asked for.
        shapes: of every value.
        marks: (module's name, first node, behind its last node) of the modules that were watched, in order.
    """

    inputs: tuple[int, ...]
    weights: dict[int, str]
    constants: dict[int, np.ndarray]
    nodes: list[RawNode]
    output: int
    shapes: dict[int, tuple[int, ...]]
    marks: list[tuple[str, int, int]]


_DROPPED = {"device", "layout", "pin_memory", "memory_format", "non_blocking", "generator"}


class _Recorder(TorchDispatchMode):
    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self._names = weights
        self._positions: tuple[int, int] | None = None  # the value, and how many tokens there are
        self._numbers: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []  # so that no other tensor gets its id
        self.weights: dict[int, str] = {}
        self.constants: dict[int, np.ndarray] = {}
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.nodes: list[RawNode] = []

    def add(self, tensor: torch.Tensor) -> int:
        number = len(self.shapes)
        self._numbers[id(tensor)] = number
        self._alive.append(tensor)
        self.shapes[number] = tuple(tensor.shape)
        return number

    def counts(self, positions: int, tokens: int) -> None:
        """From now on, whoever counts all tokens gets their positions."""
        self._positions = (positions, tokens)

    def _counted(self, out: Any) -> bool:
        """Whether an operation counted the tokens from 0: then the positions are recorded in its place."""
        if self._positions is None or tuple(out.shape) != (self._positions[1],):
            return False
        value, tokens = self._positions
        flat = torch.empty((tokens,), dtype=torch.int64, device="meta")
        places = self.add(flat)
        self.nodes.append(RawNode("aten.squeeze.dims", (Value(value), (0,)), (), (places,)))
        named = (("dtype", str(out.dtype)),)
        self.nodes.append(RawNode("aten._to_copy", (Value(places),), named, (self.add(out),)))
        return True

    def number(self, tensor: torch.Tensor) -> int:
        found = self._numbers.get(id(tensor))
        if found is not None:
            return found
        number = self.add(tensor)
        if id(tensor) in self._names:
            self.weights[number] = self._names[id(tensor)]
            return number
        if isinstance(tensor, FakeTensor):
            raise Refused("it uses a tensor that neither the checkpoint nor its configuration gives")
        if tensor.numel() * tensor.element_size() > MAX_CONSTANT_BYTES:
            raise Refused(f"it keeps a table of {tuple(tensor.shape)} numbers that is in no checkpoint")
        with ExitStack() as out:
            out.enter_context(_disable_current_modes())
            value = tensor.detach()
            value = value.float() if value.dtype == torch.bfloat16 else value
            self.constants[number] = np.array(value.numpy())
        return number

    def _told(self, argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            return Value(self.number(argument))
        if isinstance(argument, list | tuple):
            return tuple(self._told(part) for part in argument)
        if isinstance(argument, torch.dtype):
            return str(argument)
        if argument is None or isinstance(argument, bool | int | float | str):
            return argument
        return str(argument)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().replace("::", ".")
        space, base, *overload = name.split(".")
        if base.endswith("_") and not base.startswith("_") and args and isinstance(args[0], torch.Tensor):
            name = ".".join((space, base[:-1], *overload))  # what is changed in place is another value from here on
        if func is torch.ops.aten.squeeze.default:  # the sizes of this length say which; another length's may be 1 too
            func, name = torch.ops.aten.squeeze.dims, "aten.squeeze.dims"
            args = (args[0], [axis for axis, size in enumerate(args[0].shape) if size == 1])
        told = tuple(self._told(argument) for argument in args)
        named = tuple((key, self._told(value)) for key, value in sorted(kwargs.items()) if key not in _DROPPED)
        out = func(*args, **kwargs)
        if name.startswith("prim.device") or out is None:
            return out
        if _from_zero(func, args) and self._counted(out):
            return out
        outs = out if isinstance(out, list | tuple) else (out,)
        if not all(isinstance(one, torch.Tensor) for one in outs):
            if any(isinstance(one, torch.Tensor) for one in outs):
                raise Refused(f"{name} gives something else than tensors")
            return out  # a size or a dtype
        self.nodes.append(RawNode(name, told, named, tuple(self.add(one) for one in outs)))
        return out


def _from_zero(func: Any, args: Any) -> bool:
    """Whether it is an `arange` that begins at 0 and goes up by one: (end), (start, end) or (start, end, step)."""
    if func.overloadpacket is not torch.ops.aten.arange:
        return False
    start, step = (args[0] if len(args) > 1 else 0), (args[2] if len(args) > 2 else 1)
    return start == 0 and step == 1


class _Products(TorchFunctionMode):
    """Products with weights, and attention that is called by torch's name, stay one operation."""

    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            return _product(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def _plain_functions() -> Generator[None]:
    """Within it, functions that bring their own gradient are called without one."""
    base: Any = torch.autograd.Function
    original, own = base.__dict__.get("apply"), base.setup_context

    def apply(kind: Any, *args: Any) -> Any:
        if kind.setup_context is not own:
            return kind.forward(*args)
        return kind.forward(SimpleNamespace(save_for_backward=lambda *_: None), *args)

    base.apply = classmethod(apply)
    try:
        yield
    finally:
        base.apply = original


def _product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.jaxserve.linear(input, weight, bias)


def record(
    function: Callable[..., torch.Tensor],
    inputs: tuple[torch.Tensor, ...],
    weights: dict[int, str],
    fake: FakeTensorMode,
    watched: Iterable[tuple[str, torch.nn.Module]],
    attend: Callable[..., torch.Tensor],
    counted: bool = False,
) -> Recording:
    """Records `function(*inputs)`.

    Args:
        inputs: tensors of `fake`.
        weights: id of each parameter -> its name.
        watched: modules of which it is told which operations are theirs.
        attend: what torch's scaled_dot_product_attention is.
        counted: the function counts tokens itself; the second input are the positions that this stands for.
    Raises:
        Refused: what it does depends on values.
    """
    recorder = _Recorder(weights)
    marks: list[tuple[str, int, int]] = []

    given = tuple(recorder.add(tensor) for tensor in inputs)
    if counted:
        recorder.counts(given[1], inputs[1].shape[1])
    with ExitStack() as stack:
        for name, module in watched:
            begun: list[int] = []
            hooks = (
                module.register_forward_pre_hook(lambda *_, b=begun: b.append(len(recorder.nodes))),
                module.register_forward_hook(
                    lambda *_, b=begun, n=name: marks.append((n, b.pop(), len(recorder.nodes)))
                ),
            )
            for hook in hooks:
                stack.callback(hook.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(_plain_functions())
        stack.enter_context(fake)
        stack.enter_context(recorder)
        stack.enter_context(_Products(attend))
        try:
            out = torch.func.functionalize(function, remove="mutations")(*inputs)
        except DataDependentOutputException as e:
            raise Refused(f"what it computes depends on values ({e.func})") from None
        except Refused:
            raise
        except Exception as e:  # a model may raise anything about tensors without values
            said = str(e).strip().splitlines()
            raise Refused(f"it says {type(e).__name__}: {said[0] if said else ''}") from e
        result = recorder.number(out)
    return Recording(given, recorder.weights, recorder.constants, recorder.nodes, result, recorder.shapes, marks)


def options(**told: Any) -> str:
    """What one of our operations is told, as a string."""
    return json.dumps(told, sort_keys=True)
