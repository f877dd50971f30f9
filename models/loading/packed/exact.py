"""What packed checkpoints have in blocks that kernels take as they are: integers with scales and zero points, and small floats."""

from __future__ import annotations

import dataclasses

import numpy as np

from models.loading.packed.arrays import dequantize
from ops.linear.weights.block_pack import CodedRows
from ops.linear.weights.blocks import CHUNK, STEP, Form

WIDTHS = (4, 6, 8)
"""Bits that values have in blocks."""


@dataclasses.dataclass(frozen=True)
class Integers:
    """w = (value - zero) * scale.

    Attributes:
        values_OI: uint8, as many bits of them as `bits` says.
        scale_OG: as the checkpoint stores it, [O or 1, groups].
        zero: whole numbers from 0 to 255, as scales lie; or one for all.
        group: how many neighbouring inputs share a scale, or for each input its group.
    """

    values_OI: np.ndarray
    scale_OG: np.ndarray
    zero: np.ndarray | int
    group: np.ndarray | int
    bits: int

    def __post_init__(self) -> None:
        """Raises ValueError where the parts do not fit each other."""
        (O, I), (rows, groups) = self.values_OI.shape, self.scale_OG.shape
        if rows == 0 or groups == 0 or O % rows or not np.isfinite(self.scale_OG.astype(np.float32)).all():
            raise ValueError(
                f"its scales {[rows, groups]} of {[O, I]} values are no finite numbers, or do not fit them"
            )
        if isinstance(self.zero, np.ndarray) and self.zero.shape != self.scale_OG.shape:
            raise ValueError(f"it has zero points {list(self.zero.shape)} and scales {[rows, groups]}")
        if np.min(self.zero) < 0 or np.max(self.zero) > 255:
            raise ValueError(f"it has zero points from {np.min(self.zero)} to {np.max(self.zero)}; they are bytes")
        if isinstance(self.group, np.ndarray):
            if self.group.shape != (I,) or self.group.min() < 0 or self.group.max() >= groups:
                raise ValueError(f"its inputs' groups (g_idx) are not {I} numbers below {groups}")
        elif self.group * groups < I:
            raise ValueError(f"it has {groups} scales of {self.group} inputs for {I}")

    def dense(self) -> np.ndarray:
        """As float32 [O, I]."""
        zero = self.zero if isinstance(self.zero, np.ndarray) else np.full(self.scale_OG.shape, self.zero, np.float32)
        return dequantize(self.values_OI, self.scale_OG, zero, self.group)

    def coded(self) -> CodedRows | None:
        """As blocks, exactly; None where there is no such form: groups that are no power of two, or of different sizes."""
        (O, I), order = self.values_OI.shape, None
        group, groups = self.group, self.scale_OG.shape[1]
        if isinstance(group, np.ndarray):
            order, group = np.argsort(group, kind="stable"), -(-I // groups)
            if (self.group[order] != np.arange(I) // group).any():  # pyright: ignore[reportIndexIssue]
                return None
        block = block_of(group, I)
        if block is None:
            return None
        scale = (
            self.scale_OG if self.scale_OG.dtype.name in ("float16", "bfloat16") else self.scale_OG.astype(np.float32)
        )
        values = self.values_OI if order is None else self.values_OI[:, order]
        bits = next(width for width in WIDTHS if self.bits <= width)
        more = {"scale_RG": _rows(scale, O), "order_I": order}
        zero = int(self.zero if isinstance(self.zero, int) else self.zero.flat[0])
        if (np.asarray(self.zero) == zero).all() and not zero & (zero - 1):
            return CodedRows(Form(bits, zero, block, scale.dtype.name), I, np.ascontiguousarray(values), **more)
        form = Form(bits, 0, block, scale.dtype.name, "zero_point")
        zeros = np.broadcast_to(np.asarray(self.zero), self.scale_OG.shape).astype(np.uint8)
        return CodedRows(form, I, np.ascontiguousarray(values), offset_RG=_rows(zeros, O), **more)


def block_of(group: int, inputs: int) -> int | None:
    """The block that so many neighbours with one scale are in packed weights; None where there is none."""
    if group >= inputs:
        return -(-inputs // CHUNK) * CHUNK
    return group if group % CHUNK == 0 or (group >= STEP and CHUNK % group == 0) else None


FP4_FORMS = {
    True: Form(4, 16, 32, "power", table="e2m1", power=-1),
    False: Form(4, 16, 16, "float32", table="e2m1", power=-1),
}
"""Of E2M1 by whether scales are powers of two (MXFP4) or float32 (NVFP4)."""


def is_block(columns: int, groups: int) -> bool:
    """Whether so many scales of so many inputs may be those of FP4_FORMS."""
    return any(groups * form.block == columns for form in FP4_FORMS.values())


def four_bit_floats(codes_OI: np.ndarray, scale_OG: np.ndarray) -> CodedRows | None:
    """E2M1 numbers as blocks, exactly; None where there is no such form.

    Args:
        codes_OI: uint8, four bits each.
        scale_OG: float32, or exponents of two as bytes (E8M0).
    Raises:
        ValueError: a scale is not a finite number.
    """
    powers = scale_OG.dtype.itemsize == 1 and scale_OG.dtype.name in ("uint8", "float8_e8m0fnu")
    form, inputs = FP4_FORMS[powers], codes_OI.shape[1]
    if scale_OG.shape != (len(codes_OI), inputs // form.block) or inputs % form.block:
        return None
    scale_OG = np.ascontiguousarray(scale_OG.view(np.uint8) if powers else scale_OG.astype(np.float32))
    if (scale_OG == 255).any() if powers else not np.isfinite(scale_OG).all():
        raise ValueError("a scale is not a finite number")
    return CodedRows(form, inputs, np.ascontiguousarray(codes_OI), scale_RG=scale_OG)


def _rows(array_RG: np.ndarray, outputs: int) -> np.ndarray:
    """A row for each output."""
    return np.ascontiguousarray(np.repeat(array_RG, outputs // array_RG.shape[0], axis=0))
