"""Weights as bitsandbytes stores them in four bits (Dettmers et al. 2023, "QLoRA", arXiv:2305.14314): codes into a table of 16
numbers, the largest magnitude of every 64 as their scale, and those scales perhaps rounded to 8 bits in turn.

Beside `NAME.weight` lie `.absmax`, `.quant_map`, `.quant_state.bitsandbytes__nf4` (a JSON text as bytes: shape, block size and,
for rounded scales, how) and, for rounded scales, `.nested_absmax` and `.nested_quant_map`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from models.loading.packed.scheme import Scheme
from ops import buffers, casts

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
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the quantization state of {own!r} is damaged: {error}.") from None


def dequantize(read: Read, own: str) -> np.ndarray:
    """A packed weight as float32.

    Raises:
        ValueError: something that belongs to it is missing, or too short.
    """

    def need(name: str) -> np.ndarray:
        value = read(name)
        if value is None:
            raise ValueError(f"the quantized checkpoint has no tensor {name!r}.")
        return value

    state = state_of(read, own)
    assert state is not None
    count, size = int(np.prod(state["shape"])), state["blocksize"]
    table = need(f"{own}.quant_map").astype(np.float32)
    scale = need(f"{own}.absmax")
    if scale.dtype == np.uint8:
        outer = need(f"{own}.nested_absmax").astype(np.float32)
        spread = np.repeat(outer, int(state["nested_blocksize"]))[: scale.size]
        scale = need(f"{own}.nested_quant_map").astype(np.float32)[scale] * spread + state["nested_offset"]
    packed = need(own).reshape(-1).view(np.uint8)  # sharded training keeps the bytes as floats
    blocks = -(-count // size)
    if packed.size * 2 < count or scale.size < blocks or table.size != 16:
        raise ValueError(f"the tensor {own!r} is too short for its shape {list(state['shape'])}.")
    # The earlier number is in a byte's upper half.
    pairs = np.stack([np.repeat(table, 16), np.tile(table, 16)], axis=1)
    values = np.zeros((blocks, size), np.float32)
    values.reshape(-1)[:count] = pairs[packed].reshape(-1)[:count]
    out = buffers.empty((blocks, size), np.float32)
    scale_B1 = np.ascontiguousarray(scale.reshape(-1, 1)[:blocks], np.float32)
    if not casts.cast_scaled(out, values, scale_B1, 1, size):
        np.multiply(values, scale_B1, out=out)
    return out.reshape(-1)[:count].reshape(state["shape"])


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
