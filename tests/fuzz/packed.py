"""Weights packed in few bits whose parts lie of each other: shapes, types, values and what is said of them.

What is wrong must be said by a ValueError; anything else, and memory that no tensor has, is a defect.
"""

from __future__ import annotations

import json
import math
import pathlib
import random
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

from models.loading.coded import NarrowCheckpoint
from ops.linear.weights.group_pack import Rows
from tests.fuzz.mutate import mutate_json
from tests.fuzz.run import Case

O, I = 16, 64
EXPERTS = ("model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.1.down_proj.weight")
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
    affine = {
        "a.weight": some(np.uint32, O, I // 8),
        "a.scales": some(np.float16, O, 2),
        "a.biases": some(np.float16, O, 2),
    }
    float8 = {
        "a.weight": some(np.float32, O, I).astype(TYPES[6]),
        "a.weight_scale_inv": some(np.float32, O // 8, I // 32),
    }
    stack = "model.layers.0.mlp.switch_mlp.down_proj"
    stacked = {f"{stack}.weight": some(np.uint32, 2, O, I // 8), f"{stack}.scales": some(np.uint8, 2, O, 2, most=255)}
    return [
        (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32}),
        (awq, {"quant_method": "awq", "bits": 4, "group_size": 32}),
        (integers, {"quant_method": "compressed-tensors", **group}),
        (floats, {"quant_method": "compressed-tensors", **group}),
        (powers, {"quant_method": "modelopt", "quant_algo": "MXFP4"}),
        ({f"{name}_blocks": blocks, f"{name}_scales": scales}, {"quant_method": "mxfp4"}),
        (nested, {"quant_method": "bitsandbytes", "state": state}),
        (affine, {"group_size": 32, "bits": 4}),
        (stacked, {"group_size": 32, "bits": 4, "mode": "mxfp4"}),
        (float8, {"quant_method": "fp8", "weight_block_size": [8, 32]}),
        ({"a.weight": some(np.int8, O, I), "a.weight_scale": some(np.float32, O, 1)}, {"quant_method": "w8a8_int8"}),
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
        value = np.array(rng.choice((0, -1, 127, 10**6)) if array.dtype.itemsize > 2 else 127)
        array.reshape(-1)[rng.randrange(array.size)] = value.astype(array.dtype)
    return array


def packed_weights(folder: pathlib.Path) -> Case:
    """Whatever is opened is read as floats and as blocks."""
    from safetensors.numpy import save_file

    from models.loading.files.experts import ExpertLayouts
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
                checkpoint = ExpertLayouts(open_quantized(SafetensorsCheckpoint(folder), config), alternating=True)
                for name in ("a.weight", *EXPERTS):
                    if checkpoint.locate(name) is not None:
                        said += _all_of(checkpoint, name, pack if native.available() else None)
        except ValueError as error:
            said.append(str(error))
        return said

    return case


def _all_of(checkpoint: Any, name: str, pack: Any) -> list[str]:
    """What is said against a tensor as floats, and against it in blocks, whichever way round it lies."""
    said: list[str] = []
    try:
        checkpoint.read(name)
    except ValueError as error:
        said.append(str(error))
    for turned in (False, True):
        try:
            found = checkpoint.coded(name, turned)
        except ValueError as error:
            said.append(str(error))
            continue
        if found is None or pack is None:
            continue
        code, order = found
        order = np.arange(len(code.rows_RB)) if order is None else order
        shape = checkpoint.shape(name)
        shape = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
        assert (len(order), code.inputs) == (math.prod(shape[:-1]), shape[-1]), "blocks of another shape"
        pack([code], np.zeros(len(order), int), order)
    if not isinstance(checkpoint, NarrowCheckpoint):
        return said
    try:
        found = checkpoint.narrow(name)
    except ValueError as error:
        return [*said, str(error)]
    if found is not None:
        values, scale = found
        assert values.shape == checkpoint.shape(name) and scale.shape[0] == len(values), "rows of another shape"
        Rows(values, scale, None, 8).weight(values.shape, "tpu")
    return said


GGUF_NAMES = {
    "gpt-oss": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.experts.gate_up_proj_bias"),
    "llama4": ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
    "granitemoe": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    "qwen3moe": ("mlp.experts.1.gate_proj.weight", "mlp.experts.1.up_proj.weight"),
}


def gguf_experts(folder: pathlib.Path) -> Case:
    """Experts of GGUF files whose gates, ups and downs are of other shapes and types than each other's, and of damaged blocks."""
    import gguf

    from models.loading.gguf.checkpoint import GGUFCheckpoint
    from models.loading.gguf.file import GGUFFile
    from ops import native
    from ops.linear.weights.block_pack import GGUF, pack

    kinds = [gguf.GGMLQuantizationType(number) for number in (*GGUF, 0, 1, 10)]

    def case(rng: random.Random) -> Iterable[str]:
        architecture = rng.choice(sorted(GGUF_NAMES))
        writer, usual = gguf.GGUFWriter(folder / "x.gguf", architecture), rng.choice(kinds)
        shape = tuple(rng.choice(((2, O), (2, 3), (O,), (1, 2, O))))
        for part in ("gate", "up", "down", "gate_up"):
            if rng.random() < 0.15:
                continue
            kind, own = rng.choice(kinds) if rng.random() < 0.2 else usual, shape
            if rng.random() < 0.2:
                own = tuple(rng.choice(((3, O), (2, O), (), (0, O))))
            block, size = gguf.GGML_QUANT_SIZES[kind]
            width = 256 // block * size
            data = np.frombuffer(rng.randbytes(math.prod(own) * width), np.uint8).reshape(*own, width)
            ending = ".weight" if rng.random() < 0.9 else ".bias"
            writer.add_tensor(f"blk.0.ffn_{part}_exps{ending}", data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        said: list[str] = []
        with np.errstate(all="ignore"):
            try:
                checkpoint = GGUFCheckpoint(GGUFFile(folder / "x.gguf"), architecture, 1, None)
            except ValueError as error:
                return [str(error)]
            for name in GGUF_NAMES[architecture]:
                try:
                    if checkpoint.locate(f"model.layers.0.{name}") is not None:
                        said += _all_of(checkpoint, f"model.layers.0.{name}", pack if native.available() else None)
                except ValueError as error:
                    said.append(str(error))
        return said

    return case


TARGETS = {"packed": packed_weights, "gguf experts": gguf_experts}
