"""Weights that are float8, int8 or four-bit floats with scales: DeepSeek's and other float8, modelopt, Quark, GPT-OSS."""

from __future__ import annotations

from collections.abc import Collection

import ml_dtypes
import numpy as np

from models.loading.packed.arrays import FP4, as_matrix, block_of, dequantize, scale_values, scaled, signed, unpack
from models.loading.packed.exact import four_bit_floats, is_block
from models.loading.packed.scheme import Scheme, weights_config, with_columns
from ops import buffers
from ops.linear.weights.block_pack import GGUF, CodedRows

MXFP4 = 39  # GGUF's number of the type
_FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))


class Scaled(Scheme):
    """Float8 or int8 with scales by tensor, row, group or block (DeepSeek-V3), of a matrix or of the experts' stacked ones."""

    def dense_name(self, own: str) -> str | None:
        dtype = self.tensors.dtype(own)
        stacked = not own.endswith(".weight") and len(self.tensors.shape(own)) == 3
        if dtype not in (*_FLOAT8, np.int8) or not (own.endswith(".weight") or stacked):
            return None
        return own if own.endswith(".weight") or self._scale_of(own) else None

    def needs(self, own: str) -> Collection[str]:
        return () if self._scale_of(own) else (f"{own}_scale",)

    def _scale_of(self, own: str) -> str | None:
        base = own.removesuffix("weight")
        names = [f"{own}_scale_inv", f"{own}_scale", f"{own}_weight_scale", f"{own}_weight_scale_inv"]
        return self.first(
            *names,
            *(
                [f"{base}SCB", f"{base}scale", f"{base}scales", f"{base}qscale_weight"]
                if own.endswith(".weight")
                else []
            ),
        )

    def shape(self, own: str) -> tuple[int, ...]:
        return self.tensors.shape(own)

    def read(self, own: str) -> np.ndarray:
        name = self._scale_of(own)
        assert name is not None
        values, scale = self.need(own), self.need(name)
        if name.endswith("SCB"):  # bitsandbytes' int8: each row's largest magnitude
            scale = scale / np.float32(127)
        zero = self.optional(f"{own}_zero_point")
        if values.ndim == 3:
            return self._stack(values, scale_values(scale))
        scale = as_matrix(np.squeeze(scale) if scale.ndim > 2 else scale)
        blocks = block_of(values.shape, scale.shape, self._block)
        dense = scaled(values, scale, None if zero is None else as_matrix(zero.astype(np.float32)), *blocks)
        return with_columns(dense, self.optional(own.removesuffix("weight") + "pre_quant_scale"))

    def is_narrow(self, own: str) -> bool:
        smoothed = self.has(own.removesuffix("weight") + "pre_quant_scale")
        return len(self.tensors.shape(own)) == 2 and not smoothed and not self.has(f"{own}_zero_point")

    def narrow(self, own: str) -> tuple[np.ndarray, np.ndarray] | None:
        name = self._scale_of(own)
        assert name is not None
        values, scale = self.need(own), self.need(name)
        scale = as_matrix(np.squeeze(scale) if scale.ndim > 2 else scale)
        if name.endswith("SCB"):
            scale = scale / np.float32(127)
        down, across = block_of(values.shape, scale.shape, self._block)
        O, I = values.shape
        if across < I and I % across:
            return None
        return values, np.repeat(scale, down, axis=0)[:O]

    def _stack(self, values_EOI: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Matrices of experts, each with its own scales, or all with one."""
        out = np.empty(values_EOI.shape, np.float32)
        shared = scale.ndim == 0 or scale.shape[0] != len(values_EOI)
        for e, values in enumerate(values_EOI):
            own = as_matrix(scale if shared else scale[e])
            out[e] = scaled(values, own, None, *block_of(values.shape, own.shape, self._block))
        return out

    @property
    def _block(self) -> tuple[int, int] | None:
        """The block that shares a scale, where the configuration says it."""
        block = self.config.get("weight_block_size") or weights_config(self.config).get("block_structure")
        if isinstance(block, str):  # "128x128"
            block = block.lower().split("x")
        if block is not None:
            return int(block[0]), int(block[1])
        return (1, self.group_size) if self.group_size else None


class FourBitFloats(Scheme):
    """Two E2M1 in a byte: NVIDIA modelopt's NVFP4 (float8 scales of 16, all times `weight_scale_2`), and MXFP4 of it and Quark
    (powers of two of 32)."""

    def dense_name(self, own: str) -> str | None:
        if not own.endswith(".weight") or self.tensors.dtype(own) != np.uint8 or not self.has(f"{own}_scale"):
            return None
        dtype = self.tensors.dtype(f"{own}_scale")
        return own if dtype in (*_FLOAT8, np.uint8, np.dtype(ml_dtypes.float8_e8m0fnu)) else None

    def needs(self, own: str) -> Collection[str]:
        return (f"{own}_scale_2",) if self.tensors.dtype(f"{own}_scale") in _FLOAT8 else ()

    def shape(self, own: str) -> tuple[int, ...]:
        rows, columns = self.tensors.shape(own)
        return (rows, 2 * columns)

    def is_coded(self, own: str) -> bool:
        scales, smoothed = self.tensors.shape(f"{own}_scale"), self.has(own.removesuffix("weight") + "pre_quant_scale")
        return not smoothed and len(scales) == 2 and is_block(self.shape(own)[1], scales[1])

    def coded(self, own: str) -> CodedRows | None:
        return four_bit_floats(unpack(self.need(own), 4), self._scales(own))

    def _scales(self, own: str) -> np.ndarray:
        scale, overall = self.need(f"{own}_scale"), self.optional(f"{own}_scale_2")
        return scale if overall is None else scale_values(scale) * overall.astype(np.float32)

    def read(self, own: str) -> np.ndarray:
        scale, values = scale_values(self._scales(own)), FP4[unpack(self.need(own), 4)]
        dense = dequantize(values, scale, None, values.shape[1] // scale.shape[1])
        return with_columns(dense, self.optional(own.removesuffix("weight") + "pre_quant_scale"))


class FourBitRows(Scheme):
    """modelopt's W4A16_AWQ: `weight` [outputs / 2, inputs] with two outputs in a byte, and AWQ's smoothing as `pre_quant_scale`."""

    def dense_name(self, own: str) -> str | None:
        if not own.endswith(".weight") or self.tensors.dtype(own) != np.uint8 or not self.has(f"{own}_scale"):
            return None
        rows, scales = self.tensors.shape(own)[0], self.tensors.shape(f"{own}_scale")
        second = self.has(f"{own}_scale_2")  # W4A8: int4 of float8, which is another thing
        return own if not second and len(scales) == 2 and scales[0] == 2 * rows else None

    def shape(self, own: str) -> tuple[int, ...]:
        rows, columns = self.tensors.shape(own)
        return (2 * rows, columns)

    def read(self, own: str) -> np.ndarray:
        packed_HI, scale = self.need(own), as_matrix(self.need(f"{own}_scale"))
        pairs_H2I = np.stack([packed_HI & 15, packed_HI >> 4], axis=1)
        values = signed(pairs_H2I.reshape(-1, packed_HI.shape[1]), 4)
        dense = dequantize(values, scale, None, self.group_of(values.shape[1], scale.shape[1]))
        return with_columns(dense, self.optional(own.removesuffix("weight") + "pre_quant_scale"))


class ExpertBlocks(Scheme):
    """MXFP4 (OCP Microscaling Formats 1.0) as in GPT-OSS: the experts' `_blocks` [E, out, in / 32, 16] and `_scales`."""

    turned = True

    def dense_name(self, own: str) -> str | None:
        return own.removesuffix("_blocks") if own.endswith("_proj_blocks") else None

    def needs(self, own: str) -> Collection[str]:
        return (self._scales_of(own),)

    @staticmethod
    def _scales_of(own: str) -> str:
        return own.removesuffix("_blocks") + "_scales"

    def shape(self, own: str) -> tuple[int, ...]:
        (E, O, G, half), scales = self.tensors.shape(own), self._scales_of(own)
        kinds = {self.tensors.dtype(own), self.tensors.dtype(scales)}
        if half != 16 or self.tensors.shape(scales) != (E, O, G) or kinds != {np.dtype(np.uint8)}:
            raise ValueError(
                f"its blocks {[E, O, G, half]} and scales {list(self.tensors.shape(scales))} are not bytes, 16 and one a block"
            )
        return (E, G * 32, O)

    def is_coded(self, own: str) -> bool:
        return True

    def coded(self, own: str) -> CodedRows:
        """As GGUF's blocks, which are the same numbers in another order: half a byte a value, an expert at a time."""
        blocks_EOGb, scales_EOG = self.need(own), self.need(self._scales_of(own))
        (E, O, G, _), (_, form) = blocks_EOGb.shape, GGUF[MXFP4]
        out = np.empty((E, O, G, 17), np.uint8)
        for to, blocks, scales in zip(out, blocks_EOGb, scales_EOG, strict=True):
            first, second = blocks[..., :8], blocks[..., 8:]
            to[..., 0] = scales
            to[..., 1::2] = first & 15 | (second & 15) << 4
            to[..., 2::2] = first >> 4 | second & 240
        return CodedRows(form, G * 32, out.reshape(E * O, G * 17), MXFP4)

    def read(self, own: str) -> np.ndarray:
        """In bfloat16, which holds such numbers exactly: half the memory of a layer's experts."""
        blocks_EOGb, scales_EOG = self.need(own), self.need(self._scales_of(own))
        E, O, G, _ = blocks_EOGb.shape
        out_EOI = buffers.empty((E, O, G * 32), ml_dtypes.bfloat16)
        for e in range(E):
            values_OGi = FP4[unpack(blocks_EOGb[e], 4)]
            out_EOI[e] = np.ldexp(values_OGi, scales_EOG[e].astype(np.int32)[..., None] - 127).reshape(O, -1)
        return out_EOI.swapaxes(1, 2)
