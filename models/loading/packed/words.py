"""Integers packed in words: compressed-tensors, AutoGPTQ and its successors, AutoAWQ, AutoRound, Quark."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from models.loading.packed.arrays import FP4, FP6, as_matrix, dequantize, scale_values, signed, unpack
from models.loading.packed.exact import Integers, four_bit_floats, is_block
from models.loading.packed.scheme import Scheme, weights_config
from ops.linear.weights.block_pack import CodedRows

_AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where output column i of eight is in its int32


def _check_words(dtype: np.dtype) -> None:
    """Raises ValueError where integers are packed in anything else than words of four bytes."""
    if dtype.kind not in "iu" or dtype.itemsize != 4:
        raise ValueError(f"its words are {dtype}, where integers are packed in int32")


class CompressedTensors(Scheme):
    """`weight_packed` (llm-compressor): integers of up to eight bits in int32, or small floats in bytes: NVFP4, MXFP4, MXFP6.

    Tensors may differ: their shapes say how each is packed.
    """

    def dense_name(self, own: str) -> str | None:
        return own.removesuffix("_packed") if own.endswith(".weight_packed") else None

    def needs(self, own: str) -> Collection[str]:
        return (own.removesuffix("_packed") + "_scale",)

    def shape(self, own: str) -> tuple[int, ...]:
        words = self.tensors.shape(own)
        if self._is_float(own):  # does not say it: values fill their bytes
            return (words[0], words[1] * 8 // self._float_bits)
        _check_words(self.tensors.dtype(own))
        said = self.optional(own.removesuffix("_packed") + "_shape")
        if said is None:
            raise ValueError("it has no weight_shape")
        shape = tuple(int(n) for n in said.reshape(-1))
        if shape[:-1] != words[:-1]:
            raise ValueError(f"it has rows {list(words[:-1])}, and its weight_shape says {list(shape)}")
        _bits_of(words[-1], shape[-1])
        return shape

    def _is_float(self, own: str) -> bool:
        return self.tensors.dtype(own) == np.uint8

    @property
    def _float_bits(self) -> int:
        return 6 if weights_config(self.config).get("num_bits") == 6 else 4

    def read(self, own: str) -> np.ndarray:
        if self._is_float(own):
            return self._floats(own.removesuffix("_packed"), self.need(own))
        return self.integers(own).dense()

    def is_coded(self, own: str) -> bool:
        columns, scales = self.shape(own)[1], self.tensors.shape(own.removesuffix("_packed") + "_scale")
        if self._is_float(own):
            return self._float_bits == 4 and len(scales) == 2 and is_block(columns, scales[1])
        return self._is_coded(columns, scales[1] if len(scales) == 2 else 1)

    def coded(self, own: str) -> CodedRows | None:
        if not self._is_float(own):
            return self.integers(own).coded()
        scale, overall = self._float_scales(own.removesuffix("_packed"))
        return four_bit_floats(unpack(self.need(own), 4), scale if overall is None else scale_values(scale) / overall)

    def integers(self, own: str) -> Integers:
        base, words = own.removesuffix("_packed"), self.need(own)
        rows, columns = self.shape(own)
        bits, scale = _bits_of(words.shape[-1], columns), self.need(f"{base}_scale")
        scale = scale.reshape(scale.shape[0] if scale.ndim else 1, -1)
        values = unpack(words, bits)[:rows, :columns]
        offset = 1 << (bits - 1)
        zero = self.optional(f"{base}_zero_point")
        if zero is None:
            zero = offset
        elif zero.dtype == np.int32 and zero.shape != scale.shape:  # packed along the rows
            zero = unpack(zero.T, bits).T[:rows]
        else:
            zero = zero.reshape(scale.shape).astype(np.int16) + offset
        group = self.group_of(columns, scale.shape[1], self.optional(f"{base}_g_idx"))
        return Integers(values, scale, zero, group, bits)

    def _floats(self, base: str, bytes_OI: np.ndarray) -> np.ndarray:
        """Scales are float8 and all times one more (NVFP4), or powers of two."""
        scale, overall = self._float_scales(base)
        scale = scale_values(scale) if overall is None else scale_values(scale) / overall
        values = (FP4 if self._float_bits == 4 else FP6)[unpack(bytes_OI, self._float_bits)]
        return dequantize(values, scale, None, values.shape[1] // scale.shape[1])

    def _float_scales(self, base: str) -> tuple[np.ndarray, np.ndarray | None]:
        overall = self.optional(f"{base}_global_scale")
        return self.need(f"{base}_scale"), None if overall is None else overall.astype(np.float32)


class _Words(Scheme):
    """`qweight` with a row of `scales` a group, read by `integers`."""

    def read(self, own: str) -> np.ndarray:
        return self.integers(own).dense()

    def is_coded(self, own: str) -> bool:
        return self._is_coded(self.shape(own)[1], self.tensors.shape(own.removesuffix("qweight") + "scales")[0])

    def coded(self, own: str) -> CodedRows | None:
        return self.integers(own).coded()

    def integers(self, own: str) -> Integers:
        """The tensor's own integers, scales and zero points. Raises ValueError for damaged ones."""
        raise NotImplementedError


class Gptq(_Words):
    """`qweight` [inputs in words, outputs] (Frantar et al. 2022, arXiv:2210.17323) of AutoGPTQ, GPTQModel and AutoRound."""

    def dense_name(self, own: str) -> str | None:
        return own.removesuffix(".qweight") + ".weight" if own.endswith(".qweight") else None

    def needs(self, own: str) -> Collection[str]:
        return (own.removesuffix("qweight") + "scales",)

    def shape(self, own: str) -> tuple[int, ...]:
        _check_words(self.tensors.dtype(own))
        rows, columns = self.tensors.shape(own)
        return (columns, rows * 32 // self._bits(own))

    def _bits(self, own: str) -> int:
        """Where layers differ, their zero points, one for each output, say it."""
        zeros, outputs = own.removesuffix("qweight") + "qzeros", self.tensors.shape(own)[1]
        if self.has(zeros) and outputs % 32 == 0:
            return self.tensors.shape(zeros)[1] * 32 // outputs
        return int(self.config.get("bits", 4))

    @property
    def _zeros_less_one(self) -> bool:
        """The first format stores zero points less one; GPTQ v2 and AutoRound's own do not."""
        packing = str(self.config.get("packing_format", "auto_gptq"))
        own_format = packing in ("auto_round", "auto_round:gptqmodel")
        return self.config.get("checkpoint_format") != "gptq_v2" and not own_format

    def integers(self, own: str) -> Integers:
        base, bits = own.removesuffix("qweight"), self._bits(own)
        weight_OI = unpack(self.need(own).T, bits)
        scale_GO, zeros = self.need(base + "scales"), self.optional(base + "qzeros")
        if zeros is None:  # symmetric
            zero = 1 << (bits - 1)
        else:
            zero_GO = unpack(zeros, bits)[:, : scale_GO.shape[1]]
            zero = ((zero_GO + np.uint8(1)) & np.uint8((1 << bits) - 1) if self._zeros_less_one else zero_GO).T
        group = self.group_of(weight_OI.shape[1], scale_GO.shape[0], self.optional(base + "g_idx"))
        return Integers(weight_OI, scale_GO.T, zero, group, bits)


class Awq(_Words):
    """`qweight` [inputs, outputs in words] (Lin et al. 2023, arXiv:2306.00978): four bits, the eight of a word in another order."""

    def dense_name(self, own: str) -> str | None:
        return own.removesuffix(".qweight") + ".weight" if own.endswith(".qweight") else None

    def needs(self, own: str) -> Collection[str]:
        base = own.removesuffix("qweight")
        return (base + "scales", base + "qzeros")

    def shape(self, own: str) -> tuple[int, ...]:
        _check_words(self.tensors.dtype(own))
        inputs, words = self.tensors.shape(own)
        return (words * 8, inputs)

    def integers(self, own: str) -> Integers:
        base = own.removesuffix("qweight")
        weight_OI, zero_OG = (awq_rows(self.need(base + part)) for part in ("qweight", "qzeros"))
        scale_GO = self.need(base + "scales")
        group = self.group_of(weight_OI.shape[1], scale_GO.shape[0])
        return Integers(weight_OI, scale_GO.T, zero_OG, group, 4)


class QuarkIntegers(Scheme):
    """`weight` of integers as AMD Quark exports them: four bits in int32, and whatever has groups transposed."""

    def dense_name(self, own: str) -> str | None:
        packed = own.endswith(".weight") and self.has(f"{own}_scale")
        if not packed or self.method != "quark":
            return None
        grouped = self.tensors.dtype(own) in (np.int8, np.uint8) and self._said(own).get("qscheme") == "per_group"
        whole = grouped and str(self._said(own).get("dtype")) in ("int8", "uint8")
        return own if whole or self.tensors.dtype(own) == np.int32 else None

    def needs(self, own: str) -> Collection[str]:
        return (f"{own}_scale",)

    def _said(self, own: str) -> Mapping[str, Any]:
        """What the configuration says of a layer's weight."""
        module = own.removesuffix(".weight")
        layers = self.config.get("layer_quant_config") or {}
        found = next((said for name, said in layers.items() if fnmatch.fnmatchcase(module, name)), None)
        said = (found or self.config.get("global_quant_config") or {}).get("weight") or {}
        return said[0] if isinstance(said, list) else said

    def _transposed(self, own: str) -> bool:
        return self._said(own).get("qscheme", "per_group") == "per_group"

    def shape(self, own: str) -> tuple[int, ...]:
        rows, columns = self.tensors.shape(own)
        columns *= 8 if self.tensors.dtype(own) == np.int32 else 1
        return (columns, rows) if self._transposed(own) else (rows, columns)

    def read(self, own: str) -> np.ndarray:
        values, scale, zero = self._integers(own, self.need(own)), self.need(f"{own}_scale"), None
        if self.has(f"{own}_zero_point"):
            stored = self.need(f"{own}_zero_point")
            # Zero points of rows are packed as one row.
            zero = (
                self._integers(own, stored)
                if stored.ndim == 2
                else self._integers(own, stored.reshape(1, -1)).reshape(-1)
            )
        if self._transposed(own):
            # Before version 1 scales were not transposed.
            scale = scale.T if scale.shape[1] == values.shape[0] and scale.shape[0] != values.shape[0] else scale
        scale = as_matrix(scale)
        zero = None if zero is None else as_matrix(zero.astype(np.float32))
        return dequantize(values, scale, zero, -(-values.shape[1] // scale.shape[1]))

    def _integers(self, own: str, words: np.ndarray) -> np.ndarray:
        """The integers of a weight or of its zero points, [outputs, inputs or groups]."""
        if words.dtype == np.int32:
            reorder = (self.config.get("export") or {}).get("pack_method", "reorder") == "reorder"
            values = awq_rows(words).T if reorder else unpack(words, 4)
            is_signed = str(self._said(own).get("dtype", "uint4")).startswith("int")
            words = signed(values, 4) if is_signed else values
        return words.T if self._transposed(own) else words


def awq_rows(words: np.ndarray) -> np.ndarray:
    """[inputs, outputs / 8] int32 -> [outputs, inputs] uint8: AWQ's order of the eight outputs in each int32, undone."""
    turned = np.ascontiguousarray(words.T).view(np.uint32)
    out = np.empty((turned.shape[0], 8, turned.shape[1]), np.uint8)
    for i, place in enumerate(_AWQ_ORDER):
        out[:, i] = turned >> np.uint32(4 * place) & np.uint32(15)
    return out.reshape(-1, turned.shape[1])


def _bits_of(words: int, columns: int) -> int:
    """How wide values are of which `columns` fill so many int32; compressed-tensors may mix widths.

    Raises:
        ValueError: none that is known.
    """
    bits = words * 32 // columns
    if not 1 <= bits <= 8:
        raise ValueError(f"{columns} packed values in {words} words: {bits} bits each; 1 to 8 are supported")
    return bits
