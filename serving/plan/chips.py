"""Targets: what a chip can do, from its maker's published numbers, and how many of them there are."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator as JAX sees it (a device).

    Attributes:
        name: how targets call it.
        memory: bytes of device memory.
        bandwidth: bytes a second to it.
        flops: dense bfloat16 operations a second.
        int8_ops: dense int8 operations a second.
        link: bytes a second that one chip sends to its neighbours, all links together, one direction.
        source: where the numbers are published.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    int8_ops: float
    link: float
    source: str


_GIB = 1 << 30
_TPU_DOCS = "https://cloud.google.com/tpu/docs/"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 16 * _GIB, 819e9, 197e12, 394e12, 100e9, _TPU_DOCS + "v5e"),
        Chip("v5p", 95 * _GIB, 2765e9, 459e12, 918e12, 300e9, _TPU_DOCS + "v5p"),
        Chip("v6e", 32 * _GIB, 1640e9, 918e12, 1836e12, 224e9, _TPU_DOCS + "v6e"),
        Chip("a100", 80 * 10**9, 2039e9, 312e12, 624e12, 300e9, "NVIDIA A100 80GB SXM data sheet"),
        Chip("h100", 80 * 10**9, 3350e9, 989e12, 1979e12, 450e9, "NVIDIA H100 SXM data sheet"),
        Chip("h200", 141 * 10**9, 4800e9, 989e12, 1979e12, 450e9, "NVIDIA H200 SXM data sheet"),
        # Two cores of a cloud machine, as measured for docs/benchmarks: an order of magnitude, not a promise.
        Chip("cpu", 8 * _GIB, 40e9, 0.4e12, 0.8e12, 10e9, "measured on a two-core AVX-512 machine"),
    )
}
GPUS = ("a100", "h100", "h200")


@dataclasses.dataclass(frozen=True)
class Target:
    """What to plan for.

    Attributes:
        text: as given, e.g. "v5e:4x4".
        chip: its chip.
        num_devices: how many there are.
    """

    text: str
    chip: Chip
    num_devices: int

    @property
    def platform(self) -> str:
        """JAX's name: "tpu", "gpu" or "cpu"."""
        return "gpu" if self.chip.name in GPUS else "cpu" if self.chip.name == "cpu" else "tpu"


def parse_target(text: str) -> Target:
    """Reads "v5e:4x4", "v5p:2x2x1", "h100:8" or "cpu:4".

    Raises:
        ValueError: a chip that is not known or a shape that is not one.
    """
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise ValueError(f"topology {text!r}: the chip {name!r} is not known; known are {', '.join(CHIPS)}.")
    dims = 3 if name == "v5p" else 2 if name in ("v5e", "v6e") else 1
    example = {1: f"{name}:8", 2: f"{name}:4x4", 3: f"{name}:2x2x1"}[dims]
    shape = shape or "1x1x1"[: 2 * dims - 1]
    if not re.fullmatch("x".join([r"[1-9]\d*"] * dims), shape):
        raise ValueError(f"topology {text!r}: {shape!r} is not a shape of {name}; write it like {example}.")
    count = 1
    for size in shape.split("x"):
        count *= int(size)
    return Target(f"{name}:{shape}", CHIPS[name], count)
