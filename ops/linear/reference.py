"""`linear` and `embed` as slow and obvious numpy, in float64: what every implementation is tested against."""

from __future__ import annotations

import math

import numpy as np

from ops.linear.weights import Int8Weight, PackedInt8Weight, Weight
from ops.linear.weights.rotation import BLOCK


def dense(weight: Weight) -> np.ndarray:
    """The weight_OI in float64."""
    if isinstance(weight, PackedInt8Weight):
        weight = weight.unpack()
    if isinstance(weight, Int8Weight):
        dense_OI = np.asarray(weight.values_OI, np.float64) * np.asarray(weight.scale_O, np.float64)[:, None]
        return rotate(dense_OI) if weight.rotated else dense_OI
    return np.asarray(weight, np.float64)


def rotate(x_TI: np.ndarray) -> np.ndarray:
    """Each 64 neighbours times the orthogonal Hadamard matrix: entry (i, j) has the sign of the parity of i & j."""
    sign = np.array([[(-1) ** (i & j).bit_count() for j in range(BLOCK)] for i in range(BLOCK)])
    return (x_TI.reshape(-1, BLOCK) @ sign / BLOCK**0.5).reshape(x_TI.shape)


def linear(x_TI: np.ndarray, weight: Weight, bias_O: np.ndarray | None = None) -> np.ndarray:
    """y_TO = x W^T + b without rounding of the activations, in float64."""
    y_TO = np.asarray(x_TI, np.float64) @ dense(weight).T
    return y_TO if bias_O is None else y_TO + np.asarray(bias_O, np.float64)


def int8_linear(
    x_TI: np.ndarray, weight: Int8Weight, bias_O: np.ndarray | None = None, group: int | None = None
) -> np.ndarray:
    """The same with x rounded to int8 with one scale for every `group` inputs of a row (None: for all), as the int8
    bodies do; float32 rounding of x."""
    x_TI = np.asarray(rotate(np.asarray(x_TI, np.float64)) if weight.rotated else x_TI, np.float32)
    values_OI = np.asarray(weight.values_OI, np.int64)
    y_TO = np.zeros((x_TI.shape[0], values_OI.shape[0]))
    for start in range(0, x_TI.shape[1], group or x_TI.shape[1]):
        part = slice(start, start + (group or x_TI.shape[1]))
        peak_T = np.abs(x_TI[:, part]).max(axis=-1)
        scale_T = np.where(peak_T > 1e-30, peak_T / np.float32(127), np.float32(1))
        rounded = np.clip(np.rint(x_TI[:, part] / scale_T[:, None]), -127, 127).astype(np.int64)
        y_TO += (rounded @ values_OI[:, part].T) * scale_T[:, None].astype(np.float64)
    y_TO = y_TO * np.asarray(weight.scale_O, np.float64)
    return y_TO if bias_O is None else y_TO + np.asarray(bias_O, np.float64)


def rms_norm(x_TI: np.ndarray, scale_I: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * scale, in float64."""
    x_TI = np.asarray(x_TI, np.float64)
    return x_TI / np.sqrt(np.mean(x_TI**2, axis=-1, keepdims=True) + eps) * np.asarray(scale_I, np.float64)


def layer_norm(x_TI: np.ndarray, scale_I: np.ndarray, bias_I: np.ndarray, eps: float) -> np.ndarray:
    """(x - mean) / sqrt(var + eps) * scale + bias, in float64."""
    x_TI = np.asarray(x_TI, np.float64)
    x_TI = x_TI - x_TI.mean(axis=-1, keepdims=True)
    return rms_norm(x_TI, scale_I, eps) + np.asarray(bias_I, np.float64)


def gate(name: str, x: np.ndarray) -> np.ndarray:
    """The activations that blocks use, in float64."""
    if name == "relu":
        return np.maximum(x, 0.0)
    if name == "gelu":
        return 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))
    if name == "quick_gelu":
        return x / (1.0 + np.exp(-1.702 * x))
    z = x if name == "silu" else 2.0 * np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)
    return x / (1.0 + np.exp(-z))


def embed(weight: Weight, tokens_T: np.ndarray) -> np.ndarray:
    """x_TD: the rows of the table."""
    return dense(weight)[np.asarray(tokens_T)]
