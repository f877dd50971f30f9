"""Weights packed in few bits whose parts lie of each other: shapes, types, values and what is said of them.

What is wrong must be said by a ValueError; anything else, and memory that no tensor has, is a defect.
"""

from __future__ import annotations

import json
import pathlib
import random
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

from tests.fuzz.mutate import mutate_json
from tests.fuzz.run import Case

O, I = 16, 64
TYPES = (np.uint8, np.int8, np.int32, np.int64, np.float16, np.float32, ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16)


def _kinds() -> list[tuple[dict[str, np.ndarray], dict[str, Any]]]:
    """(tensors of one weight, its quantization_config) of each way of packing that blocks keep as it is."""
    rng = np.random.default_rng(0)

    def some(dtype: Any, *shape: int, least: int = 0, most: int = 256) -> np.ndarray:
        return rng.integers(least, most, shape).astype(dtype)

    words = {
        "a.qweight": some(np.int32, I // 8, O),
        "a.qzeros": some(np.int32, 2, O // 8),
        "a.scales": some(np.float16, 2, O),
    }
    gptq = words | {"a.g_idx": (np.arange(I) // 32).astype(np.int32)}
    awq = {
        "a.qweight": some(np.int32, I, O // 8),
        "a.qzeros": some(np.int32, 2, O // 8),
        "a.scales": some(np.float16, 2, O),
    }
    integers = {"a.weight_packed": some(np.int32, O, I // 8), "a.weight_scale": some(np.float16, O, 2)}
    integers |= {"a.weight_shape": np.array([O, I])}
    floats = {
        "a.weight_packed": some(np.uint8, O, I // 2),
        "a.weight_scale": some(np.float32, O, I // 16).astype(TYPES[6]),
    }
    floats |= {"a.weight_global_scale": np.ones(1, np.float32)}
    powers = {"a.weight": some(np.uint8, O, I // 2), "a.weight_scale": some(np.uint8, O, I // 32, most=255)}
    blocks, scales = some(np.uint8, 2, O, I // 32, 16), some(np.uint8, 2, O, I // 32)
    name = "model.layers.0.mlp.experts.down_proj"
    state = {"shape": [O, I], "blocksize": 64, "nested_blocksize": 4, "nested_offset": 0.5}
    nested = {"a.weight": some(np.uint8, O * I // 2, 1), "a.weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32)}
    nested |= {"a.weight.absmax": some(np.uint8, O), "a.weight.nested_absmax": np.ones(4, np.float32)}
    nested |= {"a.weight.nested_quant_map": np.linspace(-1, 1, 256, dtype=np.float32), "state": np.array([])}
    group = {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}}
    return [
        (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32}),
        (awq, {"quant_method": "awq", "bits": 4, "group_size": 32}),
        (integers, {"quant_method": "compressed-tensors", **group}),
        (floats, {"quant_method": "compressed-tensors", **group}),
        (powers, {"quant_method": "modelopt", "quant_algo": "MXFP4"}),
        ({f"{name}_blocks": blocks, f"{name}_scales": scales}, {"quant_method": "mxfp4"}),
        (nested, {"quant_method": "bitsandbytes", "state": state}),
    ]


def _changed(rng: random.Random, array: np.ndarray) -> np.ndarray:
    """Another type, other extents, or other values."""
    kind = rng.randrange(4)
    if kind == 0:
        return array.astype(rng.choice(TYPES))
    if kind == 1 and array.ndim:
        axis = rng.randrange(array.ndim)
        count = rng.choice((0, 1, array.shape[axis] // 2, array.shape[axis] + 1))
        return np.take(array, np.arange(count) % max(1, array.shape[axis]), axis) if array.shape[axis] else array
    if kind == 2:
        return array.reshape(-1) if rng.random() < 0.5 else array.reshape(-1, 1)
    if array.size:
        array = array.copy()
        array.reshape(-1)[rng.randrange(array.size)] = (
            rng.choice((0, -1, 127, 10**6)) if array.dtype.itemsize > 2 else 127
        )
    return array


def packed_weights(folder: pathlib.Path) -> Case:
    """Whatever is opened is read as floats and as blocks."""
    from safetensors.numpy import save_file

    from models.loading.files.safetensors import SafetensorsCheckpoint
    from models.loading.quantized import open_quantized
    from ops import native
    from ops.linear.weights.block_pack import pack

    kinds = _kinds()

    def case(rng: random.Random) -> Iterable[str]:
        arrays, config = rng.choice(kinds)
        arrays, config = dict(arrays), dict(config)
        state = config.pop("state", None)
        if state is not None:
            text = json.dumps(mutate_json(rng, state) if rng.random() < 0.7 else state).encode("utf-8", "surrogatepass")
            arrays["a.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)
            del arrays["state"]
        for _ in range(rng.randrange(3)):
            name = rng.choice(sorted(arrays))
            with np.errstate(all="ignore"):
                arrays[name] = np.ascontiguousarray(_changed(rng, arrays[name]))
        if rng.random() < 0.1:
            del arrays[rng.choice(sorted(arrays))]
        save_file(arrays, folder / "model.safetensors")
        said = []
        try:
            with np.errstate(all="ignore"):
                checkpoint = open_quantized(SafetensorsCheckpoint(folder), config)
                for name in ("a.weight", "model.layers.0.mlp.experts.down_proj"):
                    if checkpoint.locate(name) is None:
                        continue
                    said += _all_of(checkpoint, name, pack if native.available() else None)
        except ValueError as error:
            said.append(str(error))
        return said

    return case


def _all_of(checkpoint: Any, name: str, pack: Any) -> list[str]:
    """What is said against a tensor as floats, and against it in blocks."""
    said, found = [], None
    for take in (checkpoint.read, checkpoint.coded):
        try:
            found = take(name)
        except ValueError as error:
            said.append(str(error))
            found = None
    if found is not None and pack is not None:
        rows = len(found[0].rows_RB)
        assert (rows, found[0].inputs) == tuple(checkpoint.shape(name)), "blocks of another shape"
        pack([found[0]], np.zeros(rows, int), np.arange(rows))
    return said


TARGETS = {"packed": packed_weights}
