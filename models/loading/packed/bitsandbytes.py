"""Weights as bitsandbytes stores them in four bits (Dettmers et al. 2023, "QLoRA", arXiv:2305.14314): codes into a table of 16
numbers, the largest magnitude of every 64 as their scale, and those scales perhaps rounded to 8 bits in turn.

Beside `NAME.weight` lie `.absmax`, `.quant_map`, `.quant_state.bitsandbytes__nf4` (a JSON text as bytes: shape, block size and,
for rounded scales, how) and, for rounded scales, `.nested_absmax` and `.nested_quant_map`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from models.loading.packed.exact import block_of
from models.loading.packed.scheme import Scheme
from ops import buffers, casts
from ops.linear.weights.block_pack import CodedRows
from ops.linear.weights.blocks import TABLES, Form

STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")

Read = Callable[[str], np.ndarray | None]
"""A tensor by its name in the file; None where there is none."""


def state_of(read: Read, own: str) -> dict[str, Any] | None:
    """What is said of a packed weight; None of one that is not packed in four bits.

    Raises:
        ValueError: it is damaged.
    """
    stored = next((value for state in STATES if (value := read(own + state)) is not None), None)
    if stored is None:
        return None
    try:
        state = json.loads(stored.tobytes())
        return {**state, "shape": tuple(int(n) for n in state["shape"]), "blocksize": int(state["blocksize"])}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"the quantization state of {own!r} is damaged: {error!r}.") from None


@dataclasses.dataclass(frozen=True)
class _Packed:
    """A packed weight's parts.

    Attributes:
        codes_N: uint8, four bits each, at least as many as the shape has numbers.
        table: float32 [16], what codes stand for.
        scale_B: float32, of each `size` numbers.
    """

    shape: tuple[int, ...]
    codes_N: np.ndarray
    table: np.ndarray
    scale_B: np.ndarray
    size: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def _packed(read: Read, own: str) -> _Packed:
    """Raises ValueError: something that belongs to a weight is missing, or too short, or no number."""

    def need(name: str) -> np.ndarray:
        value = read(name)
        if value is None:
            raise ValueError(f"the quantized checkpoint has no tensor {name!r}.")
        return value

    state = state_of(read, own)
    assert state is not None
    count, size = math.prod(state["shape"]), state["blocksize"]
    if size < 1 or any(n < 1 for n in state["shape"]):
        raise ValueError(
            f"the quantization state of {own!r} says the shape {list(state['shape'])} in blocks of {size}."
        )
    table, scale = need(f"{own}.quant_map").astype(np.float32).reshape(-1), need(f"{own}.absmax").reshape(-1)
    if scale.dtype == np.uint8:
        outer, levels = (
            need(f"{own}.{part}").astype(np.float32).reshape(-1) for part in ("nested_absmax", "nested_quant_map")
        )
        try:
            each, offset = max(1, int(state["nested_blocksize"])), np.float32(state["nested_offset"])
            scale = levels[scale] * outer[np.arange(scale.size) // each] + offset
        except (KeyError, TypeError, IndexError, OverflowError) as error:
            raise ValueError(f"the scales of {own!r} cannot be made of what is said of them: {error!r}.") from None
    packed, blocks = (
        need(own).reshape(-1).view(np.uint8),
        -(-count // size),
    )  # sharded training keeps the bytes as floats
    if packed.size * 2 < count or scale.size < blocks or table.size != 16:
        raise ValueError(f"the tensor {own!r} is too short for its shape {list(state['shape'])}.")
    # The earlier number is in a byte's upper half.
    codes_N = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    return _Packed(state["shape"], codes_N, table, scale[:blocks].astype(np.float32), size)


def dequantize(read: Read, own: str) -> np.ndarray:
    """A packed weight as float32.

    Raises:
        ValueError: something that belongs to it is missing, or too short.
    """
    parts = _packed(read, own)
    values = np.zeros((len(parts.scale_B), parts.size), np.float32)
    values.reshape(-1)[: parts.count] = parts.table[parts.codes_N[: parts.count]]
    out, scale_B1 = buffers.empty(values.shape, np.float32), np.ascontiguousarray(parts.scale_B[:, None])
    if not casts.cast_scaled(out, values, scale_B1, 1, parts.size):
        np.multiply(values, scale_B1, out=out)
    return out.reshape(-1)[: parts.count].reshape(parts.shape)


class FourBits(Scheme):
    """The scheme."""

    def dense_name(self, own: str) -> str | None:
        return own if any(self.has(own + state) for state in STATES) else None

    def needs(self, own: str) -> Collection[str]:
        return (f"{own}.absmax", f"{own}.quant_map")

    def shape(self, own: str) -> tuple[int, ...]:
        state = state_of(self.optional, own)
        assert state is not None
        return state["shape"]

    def read(self, own: str) -> np.ndarray:
        return dequantize(self.optional, own)

    def is_coded(self, own: str) -> bool:
        state = state_of(self.optional, own)
        assert state is not None
        shape, size = state["shape"], state["blocksize"]
        # Blocks run on from one row to the next.
        fits = len(shape) == 2 and min(*shape, size) > 0 and shape[1] % size == 0
        return fits and block_of(size, shape[1]) is not None and _kind(self.need(f"{own}.quant_map")) is not None

    def coded(self, own: str) -> CodedRows | None:
        parts = _packed(self.optional, own)
        kind = _kind(parts.table)
        if kind is None:
            return None
        if not np.isfinite(parts.scale_B).all():
            raise ValueError("a scale is not a finite number")
        O, I = parts.shape
        block = block_of(parts.size, I)
        assert block is not None
        form = Form(4, zero=1 << 15, block=block, scale="float32", table=kind)
        scale_RG = (parts.scale_B / np.float32(_peak(kind))).reshape(O, -1)
        return CodedRows(form, I, parts.codes_N[: parts.count].reshape(O, I), scale_RG=scale_RG)


def _peak(kind: str) -> int:
    entries = TABLES[kind]
    assert entries is not None
    return max(entries)


def _kind(table: np.ndarray) -> str | None:
    """Which of the tables that kernels have a weight's is; their entries are of 16 bits."""
    for kind in ("nf4", "fp4"):
        own = np.array(TABLES[kind], np.float32) / np.float32(_peak(kind))
        if table.size == 16 and np.allclose(table.reshape(-1).astype(np.float32), own, rtol=0, atol=1.6e-5):
            return kind
    return None
