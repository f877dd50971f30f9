"""Checkpoints in few bits as accelerators take them: kept in groups, and served. A CPU stands for the accelerator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.layers import weight
from models.loading.coded import in_groups
from models.loading.load import load_model, resolve
from models.parameters import parameters_of
from models.recipes import Piece, Stack, deal
from ops import native
from ops.linear.weights import grouped
from ops.linear.weights.grouped import GroupedWeight, use_body
from serving.engine.api.config import EngineConfig
from serving.engine.device.sizing import resolve_quantization
from serving.llm import LLM, SamplingParams
from tests.models.loading.test_quantized import compressed, pack
from tests.tiny_checkpoint import write_tiny_checkpoint

KINDS = ("int4", "float8", "int8")


def in_few_bits(folder: Path, kind: str) -> Path:
    """A tiny model whose projections and head are packed: four bits with zero points by 32 inputs, float8 in blocks of 16 x 32, or
    int8 by row."""
    write_tiny_checkpoint(folder, embed=64, ffw=128)
    arrays = dict(load_file(folder / "model.safetensors"))
    for name in [name for name in arrays if "_proj" in name or name.startswith("lm_head")]:
        weight, base = arrays[name], name.removesuffix(".weight")
        O, I = weight.shape
        if I % 32:
            continue  # o, whose inputs no groups divide, stays dense
        del arrays[name]
        groups = weight.reshape(O, -1, 32)
        if kind == "int4":
            scale, zero = groups.max(-1) - groups.min(-1), np.full((O, I // 32), 7)
            scale, zero[:, 0] = (scale / 15).astype(np.float32), 8
            q = np.clip(np.round(groups / scale[..., None] + zero[..., None]), 0, 15).astype(int)
            arrays |= {f"{base}.weight_packed": pack(q.reshape(O, I)), f"{base}.weight_scale": scale}
            arrays[f"{base}.weight_zero_point"] = np.ascontiguousarray(pack(zero.T).T)
            arrays[f"{base}.weight_shape"] = np.array(weight.shape, np.int64)
        elif kind == "float8":
            blocks = weight.reshape(O // 16, 16, I // 32, 32)
            scale = (np.abs(blocks).max((1, 3)) / 448).astype(np.float32)
            q = (blocks / scale[:, None, :, None]).astype(ml_dtypes.float8_e4m3fn)
            arrays |= {name: q.reshape(O, I), f"{name}_scale_inv": scale}
        else:
            scale = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float32)
            arrays |= {name: np.round(weight / scale).astype(np.int8), f"{name}_scale": scale}
    save_file(arrays, folder / "model.safetensors")
    told = {
        "int4": compressed(4, group_size=32),
        "float8": {"quant_method": "fp8", "weight_block_size": [16, 32]},
        "int8": {"quant_method": "w8a8_int8"},
    }[kind]
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": told}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setattr(grouped, "PLATFORMS", ("cpu", "gpu", "tpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_checkpoint_has_is_kept(tmp_path, accelerator, kind):
    if kind == "int4" and not native.available():
        pytest.skip(native.status())
    folder = in_few_bits(tmp_path / "model", kind)
    options = {"source": resolve(str(folder)), "progress": False}
    dense, kept = load_model(**options).model, load_model(**options, quantization="stored").model
    wanted = dict(parameters_of(dense))
    found = {path: one for path, p in parameters_of(kept) if isinstance(one := p.get_value(), GroupedWeight)}
    assert len(found) == 2 * 3 + 1  # q, k and v in one; gate and up in one; down; and the head
    for path, one in found.items():
        assert one.dtype == ("float8_e4m3fn" if kind == "float8" else "int8")
        np.testing.assert_allclose(one.dequantize(), wanted[path].get_value(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "body"), [*zip(KINDS, ("pallas_gpu", "pallas_tpu", "xla"), strict=True)])
def test_served(tmp_path, accelerator, kind, body):
    """By default, to the tokens of the same numbers in floats; with a scheme that rounds what is dense, too."""
    if kind == "int4" and not native.available():
        pytest.skip(native.status())
    folder = in_few_bits(tmp_path / "model", kind)
    options = {"max_model_len": 64, "max_num_seqs": 4, "kv_cache_memory": 1 << 20, "dtype": "float32"}
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0, logprobs=0)
    prompts = [{"prompt_token_ids": [5, 9, 200]}, {"prompt_token_ids": list(range(3, 40))}]

    def run(**more):
        llm = LLM(str(folder), **options, **more)
        try:
            return [out.outputs[0] for out in llm.generate(prompts, params)]
        finally:
            llm.shutdown()

    with use_body(body):
        got = run()
    assert [out.token_ids for out in got] == [out.token_ids for out in run(quantization="none")]


class Narrow:
    """Float8 tensors with scales by blocks of 8 x 32."""

    def __init__(self, shapes: dict[str, tuple[int, int]]):
        rng = np.random.default_rng(0)
        self.values = {
            name: rng.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn) for name, shape in shapes.items()
        }
        self.scales = {name: rng.random((O // 8, I // 32)).astype(np.float32) for name, (O, I) in shapes.items()}

    def narrow(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return self.values[name], np.repeat(self.scales[name], 8, 0)

    def is_narrow(self, name: str, turned: bool = False) -> bool:
        return name in self.values and not turned

    def dense(self, name: str) -> np.ndarray:
        values, scale = self.narrow(name)
        return values.astype(np.float32) * np.repeat(scale, 32, 1)


def test_a_stack_of_float8_experts():
    """DeepSeek's: gates and ups in turn, each expert's rows one behind the other."""
    checkpoint = Narrow({f"{e}.{part}": (16, 64) for e in range(3) for part in ("gate", "up")})
    recipe = Stack(tuple(deal(1, *(Piece(f"{e}.{part}", (16, 64)) for part in ("gate", "up"))) for e in range(3)))
    stack = weight((3, 32, 64), np.float32, (None, None, None), blocks=True)
    rows = in_groups(recipe, stack, checkpoint)
    made = None if rows is None else rows.weight((3, 32, 64), "tpu")
    assert made is not None and made.shape == (3, 32, 64) and made.dtype == "float8_e4m3fn"
    np.testing.assert_array_equal(made.dequantize(), recipe.make(checkpoint.dense).reshape(3, 32, 64))


def test_dense_weights_are_rounded(tmp_path, accelerator):
    folder = write_tiny_checkpoint(tmp_path / "model", embed=64, ffw=128)
    model = load_model(resolve(str(folder)), progress=False, quantization="int4").model
    found = {path: p.get_value() for path, p in parameters_of(model)}
    bits = {path: 4 if one.coding.half else 8 for path, one in found.items() if isinstance(one, GroupedWeight)}
    assert bits["layers.0.mlp.gate_up.weight"] == 4 and bits["head.weight"] == 8
    assert len(bits) == 2 * 3 + 2  # the table, too; not o, whose inputs are no whole groups


def test_auto(monkeypatch):
    config = EngineConfig()
    assert resolve_quantization(config, "gpu", 1, in_blocks=10) == "stored"
    assert resolve_quantization(config, "tpu", 8, in_blocks=10) == "stored"
    assert resolve_quantization(config, "tpu", 8) is None
    assert resolve_quantization(EngineConfig(quantization="none"), "gpu", 1, in_blocks=10) is None


def test_on_a_mesh():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "tests.models.loading.groups_on_mesh"]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
