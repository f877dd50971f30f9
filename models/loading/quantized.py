"""Checkpoints whose weights are packed in four or eight bits, seen as if they were dense.

Each scheme is named by `quantization_config.quant_method` of config.json. Weights come out as float32 `[out, in]`:

- `compressed-tensors` (vLLM's llm-compressor): integers of up to eight bits packed in int32, plain int8 or float8, four-bit floats
  (NVFP4, MXFP4); scales by tensor, row, block or group of columns. Tensors may differ: their shapes say how each is packed.
- `awq` (Lin et al. 2023, arXiv:2306.00978) and `gptq` (Frantar et al. 2022, arXiv:2210.17323): packed in int32, transposed.
- `fp8`: float8 with scales by tensor, row, or block of 128 x 128 (DeepSeek-V3).
- `bitsandbytes` (see bitsandbytes.py): four bits, or int8 with a scale a row (Dettmers et al. 2022, arXiv:2208.07339).
- `mxfp4` (OCP Microscaling Formats 1.0): the experts of GPT-OSS, 32 values a scale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from models.loading import bitsandbytes
from models.loading.safetensors import SafetensorsCheckpoint, canonical_name
from ops import buffers, casts

AUXILIARY = re.compile(
    r"\.(weight_scale|weight_scale_inv|weight_zero_point|weight_shape|weight_g_idx|weight_global_scale|input_global_scale"
    r"|input_scale|output_scale|activation_scale|input_zero_point|qzeros|scales|g_idx|[kv]_scale|[qkv]_proj\.output_scale)$"
    r"|\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(nf4|fp4))$"
    r"|\.(SCB|weight_format)$|_scales$"
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
    if method not in ("compressed-tensors", "awq", "gptq", "fp8", "bitsandbytes", "mxfp4"):
        raise ValueError(
            f"the checkpoint is quantized by {method!r}, which is not supported; supported: compressed-tensors, awq, "
            "gptq, fp8, bitsandbytes, mxfp4."
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
            return self.shape_of_packed(own)
        if own.endswith(".qweight"):
            rows, columns = shape
            return (columns * 32 // bits, rows) if self._method == "awq" else (columns, rows * 32 // bits)
        if (state := bitsandbytes.state_of(self._optional, own)) is not None:
            return state["shape"]
        if own.endswith("_blocks"):  # [E, out, in / 32, 16] -> [E, in, out]
            return (shape[0], shape[2] * 32, shape[1])
        return shape

    def read(self, name: str) -> np.ndarray:
        own = self._packed_name(name)
        if own is None:
            return self._inner.read(name)
        if bitsandbytes.state_of(self._optional, own) is not None:
            return bitsandbytes.dequantize(self._optional, own)
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
        base, words = own.removesuffix("_packed"), self._inner.read(own)
        if words.dtype == np.uint8:
            return self._float4(base, words)
        rows, columns = self.shape_of_packed(own)
        bits, scale = _bits_of(words.shape[-1], columns), self._need(f"{base}_scale")
        offset = 1 << (bits - 1)
        values = unpack(words, bits)[:rows, :columns]
        zero = self._optional(f"{base}_zero_point")
        if zero is None:
            zero = np.full(scale.shape, offset, np.float32)
        elif zero.dtype == np.int32:  # packed along the rows
            zero = unpack(zero.T, bits).T[:rows]
        else:
            zero = zero.astype(np.float32) + offset
        group = self._columns_group(columns, scale.shape[1], self._optional(f"{base}_g_idx"))
        return dequantize(values, scale, zero, group)

    def _float4(self, base: str, bytes_OI: np.ndarray) -> np.ndarray:
        """NVFP4 (scales in float8, all times one more) and MXFP4 (scales that are powers of two)."""
        scale = self._need(f"{base}_scale")
        scale = np.ldexp(np.float32(1), scale.astype(np.int32) - 127) if scale.dtype == np.uint8 else scale
        overall = self._optional(f"{base}_global_scale")
        scale = scale.astype(np.float32)
        if overall is not None:
            scale = scale / overall.astype(np.float32)
        values = _FP4[unpack(bytes_OI, 4)]
        return dequantize(values, scale, None, values.shape[1] // scale.shape[1])

    def shape_of_packed(self, own: str) -> tuple[int, ...]:
        """Of a `weight_packed`; four-bit floats do not say it: they fill their bytes."""
        words = self._inner.shape(own)
        said = self._optional(own.removesuffix("_packed") + "_shape")
        return (words[0], 2 * words[1]) if said is None else tuple(int(n) for n in said)

    def _awq(self, own: str) -> np.ndarray:
        base = own.removesuffix("qweight")
        weight_OI, zero_OG = (_awq_rows(self._need(base + part)) for part in ("qweight", "qzeros"))
        scale_GO = self._need(base + "scales")
        group = self._columns_group(weight_OI.shape[1], scale_GO.shape[0], None)
        return dequantize(weight_OI, scale_GO.T, zero_OG, group)

    def _gptq(self, own: str) -> np.ndarray:
        base = own.removesuffix("qweight")
        weight_OI = unpack(self._inner.read(own).T, self._bits)
        scale_GO, order = self._need(base + "scales"), self._optional(base + "g_idx")
        zero_GO = unpack(self._need(base + "qzeros"), self._bits)[:, : scale_GO.shape[1]]
        if self._config.get("checkpoint_format") != "gptq_v2":  # the first format stores zero points less one
            zero_GO = (zero_GO + np.uint8(1)) & np.uint8((1 << self._bits) - 1)
        group = self._columns_group(weight_OI.shape[1], scale_GO.shape[0], order)
        return dequantize(weight_OI, scale_GO.T, zero_GO.T, group)

    def _scaled(self, own: str) -> np.ndarray:
        values = self._inner.read(own)
        found = (self._optional(own + suffix) for suffix in ("_scale_inv", "_scale"))
        scale = next((scale for scale in found if scale is not None), None)
        by_row = self._optional(own.removesuffix("weight") + "SCB")  # bitsandbytes' int8: each row's largest magnitude
        if scale is None and by_row is not None:
            scale = by_row / np.float32(127)
        if scale is None:
            raise ValueError(f"the quantized checkpoint has no scale for the tensor {own!r}.")
        if scale.dtype == np.uint8:  # MXFP8: powers of two
            scale = np.ldexp(np.float32(1), scale.astype(np.int32) - 127)
        zero, scale = self._optional(f"{own}_zero_point"), as_matrix(scale)
        blocks = block_of(values.shape, scale.shape, self._config_block())
        return scaled(values, scale, None if zero is None else as_matrix(zero), *blocks)

    def _config_block(self) -> tuple[int, int] | None:
        """The block that shares a scale, where the configuration says it."""
        block = self._config.get("weight_block_size") or self._weights.get("block_structure")
        if block is not None:
            return int(block[0]), int(block[1])
        return (1, self._group_size) if self._group_size else None

    def _columns_group(self, columns: int, groups: int, order: np.ndarray | None) -> np.ndarray | int:
        """Which of the groups each input is in where inputs were sorted (`order`), else how many neighbours are one."""
        size = self._group_size
        if not size or -(-columns // size) != groups:
            size = -(-columns // groups)
        if order is None or (order < 0).any() or (order == np.arange(columns) // size).all():
            return size
        return order

    def _mxfp4(self, own: str) -> np.ndarray:
        blocks_EOGb = self._inner.read(own)
        scales_EOG = self._need(own.removesuffix("_blocks") + "_scales").astype(np.int32) - 127
        E, O, G, _ = blocks_EOGb.shape
        values = np.empty((*blocks_EOGb.shape, 2), np.float32)
        values[..., 0], values[..., 1] = _FP4[blocks_EOGb & 15], _FP4[blocks_EOGb >> 4]
        dense_EOI = np.ldexp(values.reshape(E, O, G, 32), scales_EOG[..., None]).reshape(E, O, -1)
        return dense_EOI.swapaxes(1, 2)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """[rows, n] int32 or uint8 -> [rows, n * itemsize * 8 / bits] unsigned values as uint8, lowest bits first.

    Where bits do not divide a byte, values run on from one byte and word into the next.
    """
    words = np.ascontiguousarray(words).view(np.uint8)
    if 8 % bits == 0:
        out = np.empty((*words.shape, 8 // bits), np.uint8)
        for i in range(8 // bits):
            np.right_shift(words, bits * i, out=out[..., i])
        out &= np.uint8((1 << bits) - 1)
        return out.reshape(*words.shape[:-1], -1)
    stream = np.unpackbits(words, axis=-1, bitorder="little")
    count = stream.shape[-1] // bits
    values = stream[..., : count * bits].reshape(*words.shape[:-1], count, bits)
    return (values << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)


def dequantize(
    values_OI: np.ndarray, scale_OG: np.ndarray, zero_OG: np.ndarray | None, group: np.ndarray | int
) -> np.ndarray:
    """(values - zero) * scale as float32 [O, I].

    Args:
        values_OI: of any dtype.
        group: how many neighbouring inputs share a scale, or for each input its group.
    """
    scale_OG = np.ascontiguousarray(scale_OG, np.float32)
    zero_OG = None if zero_OG is None else np.ascontiguousarray(zero_OG, np.float32)
    if not isinstance(group, np.ndarray):
        return scaled(np.ascontiguousarray(values_OI), scale_OG, zero_OG, 1, group)
    out = values_OI.astype(np.float32)
    if zero_OG is not None:
        out -= zero_OG[:, group]
    out *= scale_OG[:, group]
    return out


def scaled(values: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, down: int, across: int) -> np.ndarray:
    """(values - zero) * scale as float32, where blocks of `down` x `across` share them."""
    out = buffers.empty(values.shape, np.float32)
    if casts.cast_scaled(out, values, scale, down, across, zero):
        return out
    buffers.copy(out, values)
    if zero is not None:
        out -= spread(zero, out.shape, down, across)
    out *= spread(scale, out.shape, down, across)
    return out


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


def _awq_rows(words: np.ndarray) -> np.ndarray:
    """[inputs, outputs / 8] int32 -> [outputs, inputs] uint8: AWQ's order of the eight outputs in each int32, undone."""
    turned = np.ascontiguousarray(words.T).view(np.uint32)
    out = np.empty((turned.shape[0], 8, turned.shape[1]), np.uint8)
    for i, place in enumerate(_AWQ_ORDER):
        out[:, i] = turned >> np.uint32(4 * place) & np.uint32(15)
    return out.reshape(-1, turned.shape[1])


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


def _bits_of(words: int, columns: int) -> int:
    """How wide values are of which `columns` fill so many int32; compressed-tensors may mix widths.

    Raises:
        ValueError: none that is known.
    """
    bits = words * 32 // columns
    if not 1 <= bits <= 8:
        raise ValueError(f"{columns} packed values in {words} words: {bits} bits each; 1 to 8 are supported.")
    return bits


def _bits(method: str, config: Mapping[str, Any]) -> int:
    if method not in ("awq", "gptq"):
        return 8
    bits = config.get("bits", config.get("w_bit", 4))
    supported = {"awq": (4,), "gptq": (2, 3, 4, 8)}[method]
    if bits not in supported:
        raise ValueError(f"the checkpoint has {method} weights of {bits!r} bits; supported: {list(supported)}.")
    return int(bits)
