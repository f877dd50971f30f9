"""What Unsloth writes, as it writes it: merged weights, its dynamic 4-bit copies, its 8-bit exports, GGUF beside its directory."""

from __future__ import annotations

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.loading.load import load_model, resolve
from models.parameters import parameters_of
from serving.service.adapters import plain_model
from tests.models.adapters.make import write_base
from tests.models.loading.test_quantized import NF4

EXACT = ("lm_head", "multi_modal_projector", "model.layers.0.mlp", "model.layers.1.self_attn")
"""As `llm_int8_skip_modules` of a dynamic copy: the head, parts of other models, blocks that rounding would hurt."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("unsloth") / "base")


def loaded(folder):
    found = load_model(resolve(str(folder)), dtype="float32", progress=False)
    return {path: np.asarray(value.get_value(), np.float32) for path, value in parameters_of(found.model)}


def rewritten(base, folder, tensors, **config):
    """The base with other tensors and further fields of its configuration, with the files that Unsloth puts beside them."""
    shutil.copytree(base, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"unsloth_fixed": True, "unsloth_version": "2026.8.1", "model_name": "unsloth/tiny-bnb-4bit", **config}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


def dense(base, tmp_path, tensors):
    """What a plain checkpoint of these values loads as."""
    return loaded(rewritten(base, tmp_path / "dense", tensors))


def same(found, wanted, rtol=1e-6):
    assert found.keys() == wanted.keys()
    for path, values in wanted.items():
        np.testing.assert_allclose(found[path], values, rtol=rtol, atol=1e-7, err_msg=path)


def is_packed(name):
    return name.endswith("_proj.weight") and not any(f"{name}".startswith(f"{part}.") for part in EXACT)


def nf4(name, dense_OI, rng):
    """(tensors of a weight in blocks of 64 with scales that are rounded too, the values that they stand for)."""
    codes, blocks = rng.integers(0, 16, dense_OI.size), -(-dense_OI.size // 64)
    levels = np.linspace(-1, 1, 256, dtype=np.float32)
    rounded, outer = rng.integers(0, 256, blocks).astype(np.uint8), rng.random(-(-blocks // 256)).astype(np.float32)
    absmax = levels[rounded] * np.repeat(outer, 256)[:blocks] + np.float32(0.3)
    state = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(dense_OI.shape), "nested_blocksize": 256,
        "nested_dtype": "float32", "nested_offset": 0.3,
    }  # fmt: skip
    arrays = {
        name: (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None], f"{name}.quant_map": NF4, f"{name}.absmax": rounded,
        f"{name}.nested_absmax": outer, f"{name}.nested_quant_map": levels,
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }  # fmt: skip
    values = NF4[codes] * np.repeat(absmax, 64)[: dense_OI.size]
    return arrays, values.reshape(dense_OI.shape).astype(np.float32)


def test_merged_16_bit(base, tmp_path):
    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in load_file(base / "model.safetensors").items()}
    found = loaded(rewritten(base, tmp_path / "merged", tensors, dtype="bfloat16"))
    same(found, dense(base, tmp_path, {name: value.astype(np.float32) for name, value in tensors.items()}))


def test_a_dynamic_four_bit_copy(base, tmp_path):
    """Some modules stay as they were, and are told by name alone."""
    rng, packed, plain = np.random.default_rng(1), {}, {}
    for name, value in load_file(base / "model.safetensors").items():
        arrays, values = nf4(name, value, rng) if is_packed(name) else ({name: value}, value)
        packed |= arrays
        plain[name] = values
    assert len(packed) > len(plain) and any(name.startswith(EXACT[2]) and name in packed for name in plain)
    config = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": list(EXACT),
    }  # fmt: skip
    found = loaded(rewritten(base, tmp_path / "tiny-unsloth-bnb-4bit", packed, quantization_config=config))
    same(found, dense(base, tmp_path, plain))


def test_an_eight_bit_export(base, tmp_path):
    """compressed-tensors with a scale a row, as its fp8 exports are; the head is in its list of what is left alone."""
    packed, plain = {}, {}
    for name, value in load_file(base / "model.safetensors").items():
        plain[name] = packed[name] = value
        if name.endswith("_proj.weight"):
            scale = np.abs(value).max(axis=1, keepdims=True) / 448
            packed[name] = (value / scale).astype(ml_dtypes.float8_e4m3fn)
            packed[f"{name}_scale"] = scale.astype(ml_dtypes.bfloat16)
            plain[name] = packed[name].astype(np.float32) * packed[f"{name}_scale"].astype(np.float32)
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip
    found = loaded(rewritten(base, tmp_path / "export-fp8", packed, quantization_config=config))
    same(found, dense(base, tmp_path, plain))


def test_a_gguf_beside_what_sees_for_it(base, tmp_path):
    """`save_pretrained_gguf` writes into a folder of its own; of a model that sees, the other file stands there too."""
    folder = tmp_path / "tiny_gguf"
    folder.mkdir()
    for name in ("tiny.Q8_0.gguf", "tiny.BF16-mmproj.gguf", "mmproj-F16.gguf"):
        (folder / name).write_bytes(b"GGUF")
    assert resolve(str(folder)).path == folder / "tiny.Q8_0.gguf"
    (folder / "tiny.Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="2 GGUF files"):
        resolve(str(folder))


@pytest.mark.parametrize("copy", ["tiny-unsloth-bnb-4bit", "tiny-bnb-4bit", "tiny-4bit", "tiny-GGUF", "tiny"])
def test_an_adapter_of_a_copy_is_one_of_the_model(copy):
    assert plain_model(f"unsloth/{copy}") == plain_model("owner/Tiny")
