"""Weights that torchao saves as safetensors: each tensor subclass taken apart, with its kind and numbers in the files' metadata."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from models.loading.packed.arrays import FP4, as_matrix, block_of, dequantize, scale_values, scaled, signed, unpack
from models.loading.packed.scheme import Scheme, with_columns

KINDS = ("Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor", "Int4Tensor", "MXTensor", "NVFP4Tensor")
"""The subclasses whose layout is plain; the others are laid out for one kernel."""
_DATA = "._weight_qdata"


class TorchAo(Scheme):
    """`MODULE._weight_qdata`, `_weight_scale`, ... stand for `MODULE.weight`."""

    def dense_name(self, own: str) -> str | None:
        return own.removesuffix(_DATA) + ".weight" if own.endswith(_DATA) else None

    def needs(self, own: str) -> Collection[str]:
        return (
            self._part(own, "scale"),
            *((self._part(own, "zero_point"),) if self._kind(own) == "Int4Tensor" else ()),
        )

    def _part(self, own: str, name: str) -> str:
        return own.removesuffix("qdata") + name

    def _about(self, own: str) -> Mapping[str, Any]:
        stored = self.tensors.metadata.get(own.removesuffix(_DATA) + ".weight")
        try:
            about = json.loads(stored or "")
            return about if isinstance(about["_data"], dict) else {}
        except (ValueError, KeyError, TypeError):
            return {}

    def _kind(self, own: str) -> str:
        return str(self._about(own).get("_type"))

    def shape(self, own: str) -> tuple[int, ...]:
        kind, shape = self._kind(own), self.tensors.shape(own)
        if kind not in KINDS:
            raise ValueError(f"its kind is {kind}; supported: {', '.join(KINDS)}")
        if self._about(own)["_data"].get("is_swizzled_scales"):
            raise ValueError("its scales are swizzled for one kernel")
        if len(shape) != 2:
            raise ValueError(f"it has {len(shape)} axes; matrices are supported")
        return (shape[0], shape[1] * (1 if self._unpacked(own) else 2))

    def _unpacked(self, own: str) -> bool:
        four_bits = self._kind(own) in ("Int4Tensor", "NVFP4Tensor")
        return not four_bits and not (self._kind(own) == "MXTensor" and self.tensors.dtype(own) == np.uint8)

    def read(self, own: str) -> np.ndarray:
        kind, values = self._kind(own), self.need(own)
        scale, zero = self.need(self._part(own, "scale")), self.optional(self._part(own, "zero_point"))
        if kind == "Int4Tensor":
            nibbles = signed(unpack(values.view(np.uint8), 4), 4).astype(np.float32)
            size = nibbles.shape[1] // scale.shape[0]
            spread = np.repeat(scale.T.astype(np.float32), size, axis=1)
            assert zero is not None
            dense = nibbles * spread + np.repeat(zero.T.astype(np.float32), size, axis=1)
        elif kind in ("NVFP4Tensor", "MXTensor"):
            dense = self._small_floats(own, values, scale)
        else:
            scale = as_matrix(scale)
            blocks = block_of(values.shape, scale.shape)
            zero = None if zero is None else as_matrix(zero.astype(np.float32))
            dense = scaled(np.ascontiguousarray(values), scale, zero, *blocks)
        return with_columns(dense, self.optional(self._part(own, "act_pre_scale")))

    def _small_floats(self, own: str, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
        dense = values.astype(np.float32) if self._unpacked(own) else FP4[unpack(values.view(np.uint8), 4)]
        if self._kind(own) == "MXTensor":
            scale = scale.view(ml_dtypes.float8_e8m0fnu) if scale.dtype.itemsize == 1 else scale
        factors = scale_values(scale).reshape(len(dense), -1)
        overall = self.optional(self._part(own, "per_tensor_scale"))
        if overall is not None:
            factors = factors * overall.astype(np.float32)
        return dequantize(dense, factors, None, dense.shape[1] // factors.shape[1])
