"""Weights as Apple's MLX packs them: `weight` in uint32 beside `scales` and `biases`, or small floats without biases."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from models.loading.packed.arrays import FP4, scale_values, unpack
from models.loading.packed.exact import WIDTHS, block_of, four_bit_floats, is_block
from models.loading.packed.scheme import Scheme
from ops.linear.weights.block_pack import CodedRows
from ops.linear.weights.blocks import Form

SCALES = ("float32", "float16", "bfloat16")
GROUPS = {"affine": 64, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
"""How many inputs share a scale in each mode, where the file does not say."""


class Mlx(Scheme):
    """Of a matrix [O, I], or of experts' stacked ones [E, O, I]."""

    def dense_name(self, own: str) -> str | None:
        packed = own.endswith(".weight") and self.tensors.dtype(own) == np.uint32
        return own if packed else None

    def needs(self, own: str) -> Collection[str]:
        base = own.removesuffix("weight")
        return (base + "scales", *((base + "biases",) if self._mode(own) == "affine" else ()))

    def _said(self, own: str) -> Mapping[str, Any]:
        """What the configuration says of a layer, which may differ from the rest."""
        module = self.config.get(own.removesuffix(".weight"))
        return dict(self.config) | (dict(module) if isinstance(module, Mapping) else {})

    def _mode(self, own: str) -> str:
        mode, base = self._said(own).get("mode"), own.removesuffix("weight")
        if mode is not None:
            return str(mode)
        if not self.has(base + "scales") or self.tensors.dtype(base + "scales") != np.uint8:
            return "affine"
        return "mxfp4"

    def _group(self, own: str) -> int:
        return int(self._said(own).get("group_size") or GROUPS.get(self._mode(own), 64))

    def shape(self, own: str) -> tuple[int, ...]:
        mode = self._mode(own)
        if mode not in GROUPS:
            raise ValueError(f"the mode {mode!r} is not one of {', '.join(GROUPS)}")
        words, groups = self.tensors.shape(own), self.tensors.shape(own.removesuffix("weight") + "scales")[-1]
        columns = groups * self._group(own)
        if not 2 <= words[-1] * 32 // columns <= 8:
            raise ValueError(f"{words[-1]} words of {groups} groups of {self._group(own)}")
        return (*words[:-1], columns)

    def is_coded(self, own: str) -> bool:
        shape, base = self.shape(own), own.removesuffix("weight")
        groups = self.tensors.shape(base + "scales")[-1]
        if len(shape) not in (2, 3) or self._mode(own) == "mxfp8":
            return False
        if self._mode(own) != "affine":
            return is_block(shape[-1], groups)
        kinds = [self.tensors.dtype(base + part).name for part in ("scales", "biases")]
        return all(kind in SCALES for kind in kinds) and block_of(shape[-1] // groups, shape[-1]) is not None

    def coded(self, own: str) -> CodedRows | None:
        words, base, mode = self.need(own), own.removesuffix("weight"), self._mode(own)
        columns, scale = self.shape(own)[-1], self.need(base + "scales")
        offset = self.need(base + "biases") if mode == "affine" else scale
        if scale.shape != offset.shape or scale.shape[:-1] != words.shape[:-1]:
            raise ValueError(f"its scales {list(scale.shape)} and biases {list(offset.shape)} do not fit its rows")
        bits, groups = words.shape[-1] * 32 // columns, scale.shape[-1]
        values = np.ascontiguousarray(unpack(words, bits).reshape(-1, words.shape[-1] * 32 // bits)[:, :columns])
        scale, offset = scale.reshape(-1, groups), offset.reshape(-1, groups)
        if mode != "affine":
            return four_bit_floats(values, scale if mode == "mxfp4" else scale.view(ml_dtypes.float8_e4m3fn))
        block = block_of(columns // groups, columns)
        if not all(np.isfinite(array.astype(np.float32)).all() for array in (scale, offset)):
            raise ValueError("a scale is not a finite number")
        assert block is not None
        form = Form(next(width for width in WIDTHS if bits <= width), 0, block, scale.dtype.name, offset.dtype.name)
        return CodedRows(form, columns, values, scale_RG=scale, offset_RG=offset)

    def read(self, own: str) -> np.ndarray:
        words, base, mode = self.need(own), own.removesuffix("weight"), self._mode(own)
        shape = self.shape(own)
        values, scale = unpack(words, words.shape[-1] * 32 // shape[-1]), self.need(base + "scales")
        grouped = (*shape[:-1], scale.shape[-1], shape[-1] // scale.shape[-1])
        if mode == "affine":
            out = values.reshape(grouped) * scale.astype(np.float32)[..., None]
            out += self.need(base + "biases").astype(np.float32)[..., None]
            return out.reshape(shape)
        if mode == "nvfp4":
            scale = scale.view(ml_dtypes.float8_e4m3fn)
        dense = values.view(ml_dtypes.float8_e4m3fn).astype(np.float32) if mode == "mxfp8" else FP4[values]
        return (dense.reshape(grouped) * scale_values(scale)[..., None]).reshape(shape)
