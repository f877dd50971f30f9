"""From a `RopeConfig` to the frequencies that `ops.rope` takes."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from models.config import RopeConfig
from ops.rope import inverse_frequencies


def frequencies(rope: RopeConfig, max_model_len: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies (radians a position, float32 [dim / 2]) and the factor on cos and sin.

    Args:
        max_model_len: the longest context to serve. longrope has two sets of divisors, dynamic NTK one base for every
            length; which one is used is settled here, once: positions rotated one way cannot be attended to in another.
    """
    if rope.kind == "longrope":
        return _longrope(rope, max_model_len)
    if rope.kind == "dynamic":
        return _dynamic(rope, max_model_len)
    if rope.kind == "proportional":
        return _proportional(rope)
    parameters = {name: value for name, value in dataclasses.asdict(rope).items() if value is not None}
    for own in ("proportion", "sections", "interleaved"):
        parameters.pop(own)
    parameters["rope_theta"] = parameters.pop("theta")
    parameters["rope_type"] = parameters.pop("kind")
    parameters["original_max_position_embeddings"] = parameters.pop("original_max_positions")
    return inverse_frequencies(parameters, rope.dim, rope.original_max_positions)


def _proportional(rope: RopeConfig) -> tuple[np.ndarray, float]:
    """Gemma 4's: the whole head is paired, and of its pairs the slower ones stand still."""
    turning = int(rope.proportion * rope.dim // 2)
    exponents = np.arange(0, 2 * turning, 2, dtype=np.float32) / np.float32(rope.dim)
    inv_freq = 1.0 / np.power(np.float32(rope.theta), exponents) / np.float32(rope.factor)
    return np.pad(inv_freq, (0, rope.dim // 2 - turning)).astype(np.float32), 1.0


def _dynamic(rope: RopeConfig, max_model_len: int) -> tuple[np.ndarray, float]:
    """Dynamic NTK (bloc97 and emozilla 2023): the base grows with how far contexts go beyond the original one."""
    times = max(max_model_len, rope.original_max_positions) / rope.original_max_positions
    growth = (rope.factor * times - (rope.factor - 1.0)) ** (rope.dim / (rope.dim - 2))
    return inverse_frequencies({"rope_theta": rope.theta * growth}, rope.dim)


def _longrope(rope: RopeConfig, max_model_len: int) -> tuple[np.ndarray, float]:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): every frequency has its own divisor."""
    divisors = rope.long_factor if max_model_len > rope.original_max_positions else rope.short_factor
    if len(divisors) != rope.dim // 2:
        raise ValueError(f"longrope has {len(divisors)} divisors for {rope.dim // 2} frequencies.")
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    inv_freq = 1.0 / (np.asarray(divisors, np.float32) * np.power(np.float32(rope.theta), exponents))
    scale = rope.attention_factor
    if scale is None:
        stretched = rope.factor > 1.0
        scale = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_positions)) if stretched else 1.0
    return inv_freq.astype(np.float32), scale


@functools.lru_cache(maxsize=64)
def layer_frequencies(rotary: RopeConfig, max_model_len: int) -> tuple[Any, float]:
    """Computed on the host once for all layers that share them. Where a position is several numbers, [A, r / 2]: see `ops.rope`."""
    inv_freq, factor = frequencies(rotary, max_model_len)
    return (_by_number(inv_freq, rotary) if rotary.sections else inv_freq), factor


def _by_number(inv_freq: np.ndarray, rotary: RopeConfig) -> np.ndarray:
    """Each frequency in the row of the number that it turns by, float32 [A, r / 2]; 0 in the others (M-RoPE, arXiv:2409.12191)."""
    numbers, half = len(rotary.sections), len(inv_freq)
    if not rotary.interleaved and sum(rotary.sections) != half:
        raise ValueError(f"mrope_section is {list(rotary.sections)}, for {half} frequencies.")
    owner = np.zeros(half, np.int64)
    if rotary.interleaved:
        for number in range(1, numbers):
            owner[number : numbers * rotary.sections[number] : numbers] = number
    else:
        owner = np.repeat(np.arange(numbers), rotary.sections)
    return np.where(np.arange(numbers)[:, None] == owner, inv_freq, np.float32(0.0))
