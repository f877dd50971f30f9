"""The experts of a mixture by the names that its family asks for, however the tool that saved them laid them out.

Families ask for what their authors published. transformers 5 keeps the experts of every family in two tensors, llm-compressor
takes those apart into one module an expert, MLX stacks each of the three projections.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Collection

import numpy as np

from models.loading.files.canonical import canonical_name
from models.loading.files.checkpoint import Checkpoint
from ops.linear.weights.block_pack import CodedRows, joined

_MODULES = ("mlp", "block_sparse_moe", "feed_forward")
_BLOCK = re.compile(rf"^(?P<layer>.*\.layers\.\d+)\.(?:{'|'.join(_MODULES)})\.(?P<part>.+)$")
_EXPERTS = re.compile(
    rf"^(?P<layer>.*\.layers\.\d+)\.(?:(?:{'|'.join(_MODULES)})\.)?(?P<part>(?:experts\.|input_linear|output_linear).+)$"
)
_ONE = re.compile(r"^experts\.(?P<e>\d+)\.(?P<name>gate_proj|up_proj|down_proj|w1|w2|w3)\.(?P<kind>weight|bias)$")
_FUSED = re.compile(r"^experts\.(?P<name>gate_up_proj|down_proj)(?P<kind>_bias)?$")
_ROLES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_ROUTERS = ("gate.weight", "router.weight", "router.layer.weight")
_CHOICE_BIASES = ("gate.e_score_correction_bias", "e_score_correction_bias", "gate.bias", "expert_bias")


def expert_of(name: str) -> tuple[str, int | None, str] | None:
    """(layer, expert, role) of a tensor that is one expert's, or of one that holds those of all (expert None). Roles are "gate",
    "up", "down" and "gate_up". None for other tensors."""
    block = _EXPERTS.match(name)
    part = "" if block is None else block["part"]
    if block is None or part.endswith("bias"):
        return None
    one = _ONE.match(part) or re.match(r"^experts\.(?P<e>\d+)\.(?P<name>gate_up_proj)\.(?P<kind>weight)$", part)
    if one is not None:
        return block["layer"], int(one["e"]), _ROLES.get(one["name"], "gate_up")
    fused = _FUSED.match(part.removesuffix(".weight"))
    if fused is not None:
        return block["layer"], None, fused["name"].removesuffix("_proj")
    granite = {"input_linear.weight": "gate_up", "output_linear.weight": "down"}.get(part)
    return None if granite is None else (block["layer"], None, granite)


@dataclasses.dataclass(frozen=True)
class _Slice:
    """A part of a tensor: expert `index` of those stacked on its first axis (None: the whole), rows of one `half` of the rest
    (None: all of them)."""

    name: str
    index: int | None = None
    half: int | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        rest = whole if self.index is None else whole[1:]
        return rest if self.half is None else (rest[0] // 2, *rest[1:])

    def of(self, whole: np.ndarray) -> np.ndarray:
        if self.index is not None and self.index >= len(whole):
            raise ValueError(
                f"the tensor {self.name!r} has {len(whole)} experts, and number {self.index} is asked for."
            )
        rest = whole if self.index is None else whole[self.index]
        if self.half is None:
            return rest
        middle = len(rest) // 2
        return rest[middle:] if self.half else rest[:middle]


class ExpertLayouts:
    """A `Checkpoint` that answers for experts in other layouts than its own.

    Args:
        inner: the tensors as they were saved, unpacked as they are read.
        alternating: whether the family's fused gate and up alternate (GPT-OSS); else the gate's rows are first.
    """

    def __init__(self, inner: Checkpoint, alternating: bool = False):
        self._inner, self._alternating = inner, alternating
        self._consumed: set[str] = set()
        self._last: tuple[str, np.ndarray] | None = None
        self._last_coded: tuple[str, tuple[CodedRows, np.ndarray | None] | None] | None = None
        self._lock = threading.Lock()
        self._experts: dict[str, int] = {}  # a layer's name -> how many modules of one expert it has
        for own in inner.own_names:
            block = _BLOCK.match(canonical_name(own))
            found = block and re.match(r"^experts\.(\d+)\.", block["part"])
            if block and found:
                self._experts[block["layer"]] = max(self._experts.get(block["layer"], 0), int(found[1]) + 1)

    @property
    def own_names(self) -> Collection[str]:
        return [name for name in self._inner.own_names if name not in self._consumed]

    def canonical(self, name: str) -> str:
        return self._inner.canonical(name)

    def locate(self, name: str) -> str | None:
        found = self._inner.locate(name)
        if found is not None:
            return found
        parts = self._parts(name)
        if parts is None:
            return None
        owns = [self._inner.locate(part.name) for part in parts]
        self._consumed.update(own for own in owns[1:] if own is not None)
        return owns[0]

    def shape(self, name: str) -> tuple[int, ...]:
        if self._inner.locate(name) is not None:
            return self._inner.shape(name)
        parts = self._parts(name)
        assert parts is not None
        first = parts[0].shape(tuple(self._inner.shape(parts[0].name)))
        fused = _fused(name)
        if fused is None:
            return first
        E = len(parts) // (1 if fused.startswith("down") else 2)
        rows = first[0] * (1 if fused.startswith("down") else 2)
        return (E, rows, *first[1:]) if fused.endswith("rows") else (E, *first[1:], rows)

    def read(self, name: str) -> np.ndarray:
        if self._inner.locate(name) is not None:
            return self._inner.read(name)
        parts = self._parts(name)
        assert parts is not None
        fused = _fused(name)
        if fused is None:
            return parts[0].of(self._whole(parts[0].name))
        arrays = [part.of(self._whole(part.name)) for part in parts]
        if not fused.startswith("down"):
            pairs = zip(arrays[::2], arrays[1::2], strict=True)
            join = np.stack if self._alternating and not fused.endswith("rows") else np.concatenate
            arrays = [join(pair, axis=1 if join is np.stack else 0).reshape(-1, *pair[0].shape[1:]) for pair in pairs]
        stacked = np.stack(arrays)
        return stacked if fused.endswith("rows") or stacked.ndim < 3 else stacked.swapaxes(1, 2)

    def coded(self, name: str, turned: bool = False) -> tuple[CodedRows, np.ndarray | None] | None:
        """As `models.loading.coded.CodedCheckpoint`: of whole tensors, of experts' own in a stack, and of those that a fused one is
        made of."""
        parts = self._coded_parts(name, turned)
        if parts is None:
            return None
        if parts[0].name == name:
            return self._inner.coded(name, turned)  # pyright: ignore[reportAttributeAccessIssue]
        places, codes, rows = dict.fromkeys(part.name for part in parts), [], {}
        for own in places:
            found = self._coded_whole(own)
            if found is None or found[1] is not None:
                return None
            first = sum(len(code.rows_RB) for code in codes)
            rows[own] = first + np.arange(len(found[0].rows_RB)).reshape(self._inner.shape(own)[:-1])
            codes.append(found[0])
        code = codes[0] if len(codes) == 1 else joined(codes)
        order = np.concatenate([part.of(rows[part.name]).reshape(-1) for part in parts])
        if turned and self._alternating and len(parts) > 1 and not str(_fused(name)).startswith("down"):
            order = order.reshape(len(parts) // 2, 2, -1).swapaxes(1, 2).reshape(-1)
        return None if code is None else (code, order)

    def is_coded(self, name: str, turned: bool = False) -> bool:
        """As `models.loading.coded.CodedCheckpoint`."""
        return self._coded_parts(name, turned) is not None

    def narrow(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """As `models.loading.coded.NarrowCheckpoint`: of tensors that there are."""
        return self._inner.narrow(name) if self.is_narrow(name) else None  # pyright: ignore[reportAttributeAccessIssue]

    def is_narrow(self, name: str, turned: bool = False) -> bool:
        """As `models.loading.coded.NarrowCheckpoint`."""
        if not hasattr(self._inner, "is_narrow") or self._inner.locate(name) is None:
            return False
        return self._inner.is_narrow(name, turned)  # pyright: ignore[reportAttributeAccessIssue]

    def _coded_parts(self, name: str, turned: bool) -> list[_Slice] | None:
        """What a tensor's rows lie in, all of it in blocks; None where some of it is not, or lies the other way round."""
        if not hasattr(self._inner, "is_coded"):
            return None
        is_coded = self._inner.is_coded  # pyright: ignore[reportAttributeAccessIssue]
        if self._inner.locate(name) is not None:
            return [_Slice(name)] if is_coded(name, turned) else None
        parts, fused = self._parts(name) or [], _fused(name) if _BLOCK.match(name) else None
        if turned != (fused is not None and not fused.endswith("rows")) or not all(
            is_coded(part.name) for part in parts
        ):
            return None
        return parts or None

    def _coded_whole(self, name: str) -> tuple[CodedRows, np.ndarray | None] | None:
        """A tensor's rows, kept until another's are read, as experts of a stack come one after the other."""
        with self._lock:
            if self._last_coded is None or self._last_coded[0] != name:
                self._last_coded = (name, self._inner.coded(name))  # pyright: ignore[reportAttributeAccessIssue]
            return self._last_coded[1]

    def release(self, name: str) -> None:
        if self._inner.locate(name) is not None:
            self._inner.release(name)
            return
        for part in self._parts(name) or ():
            if part.index is None:
                self._inner.release(part.name)

    def _whole(self, name: str) -> np.ndarray:
        """A tensor, kept until another is read: experts of a stack come one after the other, and unpacking takes time."""
        with self._lock:
            if self._last is None or self._last[0] != name:
                self._last = (name, self._inner.read(name))
            return self._last[1]

    def _parts(self, name: str) -> list[_Slice] | None:
        """What `name` is made of: one slice, or of a fused tensor each expert's gate and up (or down) in turn."""
        block = _BLOCK.match(name)
        if block is None:
            return None
        layer, part = block["layer"], block["part"]
        for names in (_ROUTERS, _CHOICE_BIASES):
            if part in names:
                return _listed(self._first(layer, names))
        one = _ONE.match(part)
        if one:
            return _listed(self._expert(layer, int(one["e"]), _ROLES[one["name"]], one["kind"]))
        fused = _fused(name)
        if fused is None:
            other = _BLOCK.match(name)
            assert other is not None
            return _listed(self._first(layer, (part,)))
        roles = ("down",) if fused.startswith("down") else ("gate", "up")
        kind = "bias" if "bias" in fused else "weight"
        found = [self._expert(layer, e, role, kind) for e in range(self._count(layer)) for role in roles]
        return [part for part in found if part is not None] if found and None not in found else None

    def _first(self, layer: str, parts: tuple[str, ...]) -> _Slice | None:
        names = (f"{layer}.{module}.{part}" for part in parts for module in _MODULES)
        return next((_Slice(name) for name in names if self._inner.locate(name) is not None), None)

    def _expert(self, layer: str, e: int, role: str, kind: str) -> _Slice | None:
        """One expert's projection, wherever it is."""
        theirs = [name for name, of in _ROLES.items() if of == role]
        alone = self._first(layer, tuple(f"experts.{e}.{name}.{kind}" for name in theirs))
        if alone is not None:
            return alone
        stacked = self._first(
            layer, tuple(f"{where}.{name}.{kind}" for where in ("switch_mlp", "experts") for name in theirs)
        )
        if stacked is not None:
            return _Slice(stacked.name, e)
        ending = "_bias" if kind == "bias" else ""
        fused = "down_proj" if role == "down" else "gate_up_proj"
        granite = () if kind == "bias" else ("output_linear.weight" if role == "down" else "input_linear.weight",)
        both = self._first(layer, (f"experts.{fused}{ending}", f"experts.{fused}.{kind}", *granite))
        if both is None:
            return None
        return _Slice(both.name, e, None if role == "down" else int(role == "up"))

    def _count(self, layer: str) -> int:
        if layer in self._experts:
            return self._experts[layer]
        first = self._expert(layer, 0, "down", "weight")
        return 0 if first is None else self._inner.shape(first.name)[0]


def _listed(part: _Slice | None) -> list[_Slice] | None:
    return None if part is None else [part]


def _fused(name: str) -> str | None:
    """Which fused tensor a family asks for: "gate_up" or "down" with [in, out] matrices, "... bias", or "... rows" of Granite,
    whose matrices are [out, in]; None for others."""
    block = _BLOCK.match(name)
    assert block is not None
    if block["part"] in ("input_linear.weight", "output_linear.weight"):
        return "gate_up rows" if block["part"].startswith("input") else "down rows"
    fused = _FUSED.match(block["part"])
    return None if fused is None else fused["name"].removesuffix("_proj") + (" bias" if fused["kind"] else "")
