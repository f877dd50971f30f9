"""Checkpoints whose weights are packed in four or eight bits, seen as if they were dense.

Each scheme is named by `quantization_config.quant_method` of config.json. Weights come out as float32 `[out, in]`:

- `compressed-tensors` (vLLM's llm-compressor): int4 or int8 packed in int32, or plain int8 or float8; scales by tensor,
  row or group of columns.
- `awq` (Lin et al. 2023, arXiv:2306.00978) and `gptq` (Frantar et al. 2022, arXiv:2210.17323): packed in int32, transposed.
- `fp8`: float8 with scales by tensor, row, or block of 128 x 128 (DeepSeek-V3).
- `mxfp4` (OCP Microscaling Formats 1.0): the experts of GPT-OSS, 32 values a scale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from models.loading import buffers
from models.loading.safetensors import SafetensorsCheckpoint, canonical_name
from ops import casts

AUXILIARY = re.compile(
    r"\.(weight_scale|weight_scale_inv|weight_zero_point|weight_shape|weight_g_idx|input_scale|output_scale"
    r"|activation_scale|input_zero_point|qzeros|scales|g_idx|[kv]_scale|[qkv]_proj\.output_scale)$|_scales$"
)
"""Tensors that belong to a packed weight, and activation scales, which float32 activations do without."""

_AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where output column i of eight is in its int32
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def open_quantized(inner: SafetensorsCheckpoint, config: Mapping[str, Any]) -> DequantizingCheckpoint:
    """The dense view of a checkpoint.

    Args:
        config: `quantization_config` of config.json.
    Raises:
        ValueError: a scheme that is not supported, by name.
    """
    method = config.get("quant_method", "compressed-tensors" if "config_groups" in config else None)
    if method not in ("compressed-tensors", "awq", "gptq", "fp8", "mxfp4"):
        raise ValueError(
            f"the checkpoint is quantized by {method!r}, which is not supported; supported: compressed-tensors, awq, "
            "gptq, fp8, mxfp4."
        )
    return DequantizingCheckpoint(inner, method, config)


class DequantizingCheckpoint:
    """A `Checkpoint` that unpacks weights as they are read."""

    def __init__(self, inner: SafetensorsCheckpoint, method: str, config: Mapping[str, Any]):
        self._inner, self._method, self._config = inner, method, config
        self._bits = _bits(method, config)
        self._weights = _weights_config(config)
        size = self._weights.get("group_size") or config.get("group_size") or config.get("q_group_size") or 0
        self._group_size = max(int(size), 0)  # -1: a whole row
        self._primary: dict[str, str] = {}
        for own in inner.own_names:
            dense = _dense_name(canonical_name(own))
            if dense is not None:
                self._primary[dense] = own
            elif own.endswith(".weight") and inner.dtype(own).itemsize == 1:
                self._primary[canonical_name(own)] = own

    @property
    def own_names(self) -> Collection[str]:
        return [own for own in self._inner.own_names if not AUXILIARY.search(own)]

    def locate(self, name: str) -> str | None:
        return self._packed_name(name) or self._inner.locate(name)

    def _packed_name(self, name: str) -> str | None:
        return self._primary.get(name) or self._primary.get(name.removeprefix("model."))

    def shape(self, name: str) -> tuple[int, ...]:
        own = self._packed_name(name)
        if own is None:
            return self._inner.shape(name)
        shape = self._inner.shape(own)
        bits = self._bits
        if own.endswith(".weight_packed"):
            return tuple(int(n) for n in self._inner.read(own.removesuffix("_packed") + "_shape"))
        if own.endswith(".qweight"):
            rows, columns = shape
            return (columns * 32 // bits, rows) if self._method == "awq" else (columns, rows * 32 // bits)
        if own.endswith("_blocks"):  # [E, out, in / 32, 16] -> [E, in, out]
            return (shape[0], shape[2] * 32, shape[1])
        return shape

    def read(self, name: str) -> np.ndarray:
        own = self._packed_name(name)
        if own is None:
            return self._inner.read(name)
        readers: dict[str, Callable[[str], np.ndarray]] = {
            ".weight_packed": self._packed,
            ".qweight": self._awq if self._method == "awq" else self._gptq,
            "_blocks": self._mxfp4,
            ".weight": self._scaled,
        }
        return next(reader for suffix, reader in readers.items() if own.endswith(suffix))(own)

    def release(self, name: str) -> None:
        self._inner.release(self._packed_name(name) or name)

    def _optional(self, own: str) -> np.ndarray | None:
        return self._inner.read(own) if self._inner.locate(own) is not None else None

    def _need(self, own: str) -> np.ndarray:
        value = self._optional(own)
        if value is None:
            raise ValueError(f"the quantized checkpoint has no tensor {own!r}.")
        return value

    def _packed(self, own: str) -> np.ndarray:
        base = own.removesuffix("_packed")
        rows, columns = (int(n) for n in self._need(f"{base}_shape"))
        offset = 1 << (self._bits - 1)
        values = unpack(self._inner.read(own), self._bits)[:rows, :columns].astype(np.float32) - offset
        scale = self._need(f"{base}_scale").astype(np.float32)
        zero = self._optional(f"{base}_zero_point")
        order = self._optional(f"{base}_g_idx")
        if zero is not None:
            if zero.dtype == np.int32:  # packed along the rows
                zero = unpack(zero.T, self._bits).T[:rows].astype(np.float32) - offset
            zero = zero.astype(np.float32)
        group = self._columns_group(columns, scale.shape[1], order)
        values -= 0 if zero is None else zero[:, group]
        return values * scale[:, group]

    def _awq(self, own: str) -> np.ndarray:
        base = own.removesuffix("qweight")
        weight_IO, zero_GO = (_awq_columns(self._need(base + part), self._bits) for part in ("qweight", "qzeros"))
        scale_GO = self._need(base + "scales").astype(np.float32)
        size = weight_IO.shape[0] // scale_GO.shape[0]
        groups = weight_IO.reshape(-1, size, weight_IO.shape[1]).astype(np.float32)
        dense = (groups - zero_GO[:, None]) * scale_GO[:, None]
        return np.ascontiguousarray(dense.reshape(weight_IO.shape).T)

    def _gptq(self, own: str) -> np.ndarray:
        base = own.removesuffix("qweight")
        weight_OI = unpack(self._inner.read(own).T, self._bits).astype(np.float32)
        scale_GO = self._need(base + "scales").astype(np.float32)
        # The first GPTQ format stores zero points less one.
        less = 0 if self._config.get("checkpoint_format") == "gptq_v2" else 1
        zero_GO = unpack(self._need(base + "qzeros"), self._bits).astype(np.float32) + less
        order = self._optional(base + "g_idx")
        group = self._columns_group(weight_OI.shape[1], scale_GO.shape[0], order)
        return (weight_OI - zero_GO.T[:, group]) * scale_GO.T[:, group]

    def _scaled(self, own: str) -> np.ndarray:
        values = self._inner.read(own)
        found = (self._optional(own + suffix) for suffix in ("_scale_inv", "_scale"))
        scale = next((scale for scale in found if scale is not None), None)
        if scale is None:
            raise ValueError(f"the quantized checkpoint has no scale for the tensor {own!r}.")
        zero = self._optional(f"{own}_zero_point")
        scale = as_matrix(scale)
        down, across = block_of(values.shape, scale.shape, self._config_block(values.shape))
        out = buffers.empty(values.shape, np.float32)
        if zero is None and casts.cast_scaled(out, values, scale, down, across):
            return out
        buffers.copy(out, values)
        if zero is not None:
            out -= spread(as_matrix(zero), out.shape, down, across)
        out *= spread(scale, out.shape, down, across)
        return out

    def _config_block(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """The block that shares a scale, where the configuration says it."""
        block = self._config.get("weight_block_size") or self._weights.get("block_structure")
        if block is not None:
            return int(block[0]), int(block[1])
        return (1, self._group_size) if self._group_size else None

    def _columns_group(self, columns: int, groups: int, order: np.ndarray | None) -> np.ndarray:
        """For each input, which of the groups it is in: `order` where activations were sorted, else neighbours."""
        if order is not None and (order >= 0).all():
            return order
        size = self._group_size
        if not size or -(-columns // size) != groups:
            size = -(-columns // groups)
        return np.arange(columns) // size

    def _mxfp4(self, own: str) -> np.ndarray:
        blocks_EOGb = self._inner.read(own)
        scales_EOG = self._need(own.removesuffix("_blocks") + "_scales").astype(np.int32) - 127
        E, O, G, _ = blocks_EOGb.shape
        values = np.empty((*blocks_EOGb.shape, 2), np.float32)
        values[..., 0], values[..., 1] = _FP4[blocks_EOGb & 15], _FP4[blocks_EOGb >> 4]
        dense_EOI = np.ldexp(values.reshape(E, O, G, 32), scales_EOG[..., None]).reshape(E, O, -1)
        return dense_EOI.swapaxes(1, 2)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """[rows, n] int32 -> [rows, n * 32 / bits] unsigned values as int32, lowest bits first.

    Three bits do not divide a word: there values run on from one word into the next.
    """
    words = np.ascontiguousarray(words)
    if 32 % bits == 0:
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        values = (words.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
        return values.reshape(*words.shape[:-1], -1).astype(np.int32)
    stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    return stream.reshape(*words.shape[:-1], -1, bits) @ (1 << np.arange(bits, dtype=np.int32))


def as_matrix(scale: np.ndarray) -> np.ndarray:
    """A scale (or zero) of a tensor, of rows, or of blocks as float32 [blocks down, blocks across]."""
    return np.ascontiguousarray(scale.reshape(scale.shape[0] if scale.ndim else 1, -1).astype(np.float32))


def block_of(shape: tuple[int, ...], scales: tuple[int, ...], said: tuple[int, int] | None = None) -> tuple[int, int]:
    """(rows, columns) of a matrix that share one of its `scales`.

    Args:
        said: what the configuration says, for matrices that are not whole blocks; where scales are fewer or more than that
            makes them (one a tensor or a row), their number says it.
    """
    if said is not None and tuple(-(-n // size) for n, size in zip(shape, said, strict=True)) == scales:
        return said
    down, across = (-(-n // count) for n, count in zip(shape, scales, strict=True))
    return down, across


def spread(scale: np.ndarray, shape: tuple[int, ...], down: int, across: int) -> np.ndarray:
    """A scale of blocks as something that multiplies an array of `shape`."""
    rows, columns = shape
    if scale.shape[0] not in (1, rows):
        scale = np.repeat(scale, down, axis=0)[:rows]
    if scale.shape[1] not in (1, columns):
        scale = np.repeat(scale, across, axis=1)[:, :columns]
    return scale


def _awq_columns(words: np.ndarray, bits: int) -> np.ndarray:
    """AWQ's order of the eight columns in each int32, undone."""
    values = unpack(words, bits)
    return values.reshape(values.shape[0], -1, 8)[..., _AWQ_ORDER].reshape(values.shape)


def _dense_name(canonical: str) -> str | None:
    """The name of the dense tensor that a packed one stands for; None for tensors that are not packed."""
    for packed, dense in ((".weight_packed", ".weight"), (".qweight", ".weight"), ("_proj_blocks", "_proj")):
        if canonical.endswith(packed):
            return canonical.removesuffix(packed) + dense
    return None


def _weights_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What compressed-tensors says of the weights; nothing for other schemes."""
    groups = list((config.get("config_groups") or {}).values())
    return (groups[0].get("weights") or {}) if groups else {}


def _bits(method: str, config: Mapping[str, Any]) -> int:
    if method == "compressed-tensors":
        groups = (config.get("config_groups") or {}).values()
        widths = {(group.get("weights") or {}).get("num_bits", 8) for group in groups}
        if len(widths) > 1:
            raise ValueError(f"the checkpoint mixes weights of {sorted(widths)} bits, which is not supported.")
        bits = widths.pop() if widths else 8
    else:
        bits = config.get("bits", config.get("w_bit", 4)) if method in ("awq", "gptq") else 8
    supported = {"awq": (4,), "gptq": (2, 3, 4, 8)}.get(method, (2, 4, 8))
    if bits not in supported:
        raise ValueError(f"the checkpoint has {method} weights of {bits!r} bits; supported: {list(supported)}.")
    return int(bits)
