"""How a packed checkpoint's weights will lie on GPUs and TPUs, by what its configuration says: no tensor is read for a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.loading.packed.scheme import weights_config
from models.loading.quantized import method_of
from ops.linear.weights.group_pack import Packing

FOUR, EIGHT = 4, 8


def packing_of(hf: Mapping[str, Any]) -> Packing | None:
    """The form of a checkpoint's packed weights; None where it has none, or they become floats when they are loaded.

    Args:
        hf: config.json.
    """
    config = hf.get("quantization_config") or {}
    if not isinstance(config, Mapping) or not config:
        return None
    method = method_of(config)
    group = int(config.get("group_size") or config.get("q_group_size") or 0)
    group = max(group, 0)
    if method in ("awq", "gptq", "auto-round"):
        bits = int(config.get("bits", config.get("w_bit", FOUR)))
        offsets = not config.get("sym", method != "awq")
        return Packing(FOUR if bits <= FOUR else EIGHT, group, offsets=offsets)
    if method in ("fp8", "fbgemm_fp8", "w8a8_fp8"):
        block = config.get("weight_block_size")
        return Packing(EIGHT, int(block[1]) if block else 0, values="float8_e4m3fn")
    if method in ("w8a8_int8", "blockwise_int8"):
        block = config.get("weight_block_size")
        return Packing(EIGHT, int(block[1]) if block else 0)
    if method == "mxfp4":
        return Packing(FOUR, 32, scale="bfloat16", table=True, experts=True)
    if method == "bitsandbytes":
        return Packing(FOUR, 64, table=True) if config.get("load_in_4bit", True) else Packing(EIGHT, 0)
    if method == "modelopt":
        algo = str(config.get("quant_algo", "")).upper()
        if "NVFP4" in algo:
            return Packing(FOUR, 16, table=True)
        return Packing(EIGHT, 0, values="float8_e4m3fn") if algo == "FP8" else None
    if method == "compressed-tensors":
        return _compressed(weights_config(config))
    return None


def _compressed(weights: Mapping[str, Any]) -> Packing | None:
    """Of compressed-tensors, by what it says of the weights."""
    bits, group = int(weights.get("num_bits") or EIGHT), max(int(weights.get("group_size") or 0), 0)
    if weights.get("type") == "float":
        if bits == FOUR:
            return Packing(FOUR, group or 16, table=True)
        block = weights.get("block_structure")
        return Packing(EIGHT, int(block[1]) if isinstance(block, list) else group, values="float8_e4m3fn")
    return Packing(FOUR if bits <= FOUR else EIGHT, group, offsets=not weights.get("symmetric", True))
