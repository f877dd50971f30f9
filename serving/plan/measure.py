"""Compiling a program for a target and reading off what the compiler says of it."""

from __future__ import annotations

import collections
import dataclasses
import re
import time
from typing import Any

import jax

from serving.engine.device.programs.compiling import Program

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_BYTES = {
    "pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_CALL = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_GROUPS = re.compile(
    r"replica_groups=(?:\{\{(?P<listed>[\d,]*)\}|\[\d+,(?P<size>\d+)\]|mesh\[(?P<axes>[^\]]*)\]\s*\{(?P<used>[^}]*)\})"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
        kind: of KINDS.
        bytes: of its result on one device (of its operand, for a reduce-scatter).
        devices: how many take part; 0 where the program does not say.
    """

    kind: str
    bytes: int
    devices: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a ring."""
        n = max(self.devices, 2)
        if self.kind == "all-reduce":
            return 2 * (n - 1) / n * self.bytes
        if self.kind == "collective-permute":
            return float(self.bytes)
        return (n - 1) / n * self.bytes


def collectives(hlo: str) -> list[Collective]:
    """The collectives in the text of a compiled program. One in a loop or a branch counts once."""
    found = []
    for line in hlo.splitlines():
        call = _CALL.search(line)
        if not call:
            continue
        result, kind, start, rest = call.groups()
        sizes = [_size(name, dims) for name, dims in _ARRAY.findall(result) if name in _BYTES]
        if not sizes:
            continue
        # What a -start returns holds its operands too, and scalars of the hardware's.
        nbytes = sum(sizes) if not start else max(sizes) if kind != "all-reduce" else sum(sizes)
        devices = _group_size(rest)
        if kind == "reduce-scatter":
            nbytes *= max(devices, 1)
        found.append(Collective(kind, nbytes, devices))
    return found


def _group_size(text: str) -> int:
    """Devices of the first group: {{0,1},{2,3}}, [groups, size]<=[...] or mesh['a'=2,'b'=4] {'b'}."""
    groups = _GROUPS.search(text)
    if groups is None:
        return 0
    if groups["listed"] is not None:
        return len(groups["listed"].split(","))
    if groups["size"] is not None:
        return int(groups["size"])
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", groups["axes"]))
    count = 1
    for axis in re.findall(r"'([^']+)'", groups["used"]):
        count *= int(sizes[axis])
    return count


def _size(name: str, dims: str) -> int:
    count = 1
    for extent in filter(None, dims.split(",")):
        count *= int(extent)
    return count * _BYTES[name]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the compiler says of one program on one device.

    Attributes:
        flops, bytes_accessed: its cost model's; attention kernels are not in them.
        arguments, outputs, aliased, temporaries, code: bytes.
        collectives: count and bytes a device sends, by kind.
        seconds: spent on lowering and compiling here.
    """

    flops: float
    bytes_accessed: float
    arguments: float
    outputs: float
    aliased: float
    temporaries: float
    code: float
    collectives: dict[str, tuple[float, float]]
    seconds: float

    @property
    def sent(self) -> float:
        """Bytes that one device sends in a call."""
        return sum(sent for _, sent in self.collectives.values())

    @property
    def num_collectives(self) -> float:
        return sum(count for count, _ in self.collectives.values())


def measure(program: Program) -> Measured:
    """Compiles a program for the devices that its arguments are placed on."""
    began = time.monotonic()
    compiled = jax.jit(program.fn, donate_argnums=program.donate).lower(*program.args).compile()
    seconds = time.monotonic() - began
    cost: Any = compiled.cost_analysis() or {}
    memory: Any = compiled.memory_analysis()
    counts: dict[str, tuple[float, float]] = collections.defaultdict(lambda: (0.0, 0.0))
    for one in collectives(compiled.as_text() or ""):
        count, sent = counts[one.kind]
        counts[one.kind] = (count + 1, sent + one.sent)
    return Measured(
        flops=float(cost.get("flops", 0.0)),
        bytes_accessed=float(cost.get("bytes accessed", 0.0)),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        collectives=dict(counts),
        seconds=seconds,
    )


def extrapolate(few: Measured, more: Measured, layers: tuple[int, int], wanted: int) -> Measured:
    """The program with `wanted` layers, from those with layers[0] and layers[1]: a line through both.

    Everything that layers add is the same for each of them; what it is not, temporaries, is taken at its largest: they
    are used again from layer to layer.
    """

    def line(a: float, b: float) -> float:
        return a + (b - a) * (wanted - layers[0]) / (layers[1] - layers[0])

    kinds = few.collectives.keys() | more.collectives.keys()
    none = (0.0, 0.0)
    return Measured(
        flops=line(few.flops, more.flops),
        bytes_accessed=line(few.bytes_accessed, more.bytes_accessed),
        arguments=line(few.arguments, more.arguments),
        outputs=line(few.outputs, more.outputs),
        aliased=line(few.aliased, more.aliased),
        temporaries=max(few.temporaries, more.temporaries),
        code=line(few.code, more.code),
        collectives={
            kind: tuple(map(line, few.collectives.get(kind, none), more.collectives.get(kind, none)))  # type: ignore[misc]
            for kind in sorted(kinds)
        },
        seconds=few.seconds + more.seconds,
    )
