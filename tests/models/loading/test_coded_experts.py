"""GPT-OSS's experts, four-bit floats of which gates and ups alternate, computed as they are stored."""

from __future__ import annotations

import json
import math

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from models.layers import Build
from models.loading.coded import coded, count_coded
from models.loading.gguf.checkpoint import GGUFCheckpoint
from models.loading.gguf.file import GGUFFile
from models.loading.load import load_model, resolve
from models.loading.opening import open_checkpoint
from models.loading.packed.scaled import ExpertBlocks
from models.parameters import parameters_of
from models.registry import find
from ops import native
from ops.linear import PackedInt8Weight
from ops.linear.weights.blocks import BlockWeight

pytestmark = pytest.mark.skipif(not native.available(), reason=native.status())

E, D, F = 4, 64, 32
CONFIG = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": D, "intermediate_size": F,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 32,
    "max_position_embeddings": 64, "sliding_window": 16, "num_local_experts": E, "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_scaling": None,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
}  # fmt: skip
EXPERTS = "model.layers.0.mlp.experts"


def unfilled():
    """The network before its weights."""
    family = find("GptOssForCausalLM")
    return family.build(family.config(CONFIG), Build(max_model_len=64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in the layout that its authors publish: experts packed, all else in bfloat16."""
    where, rng = tmp_path_factory.mktemp("gpt_oss"), np.random.default_rng(0)
    arrays = {}
    for piece in (piece for recipe in unfilled().recipes().values() for piece in recipe.pieces):
        if not piece.turned:
            arrays[piece.name] = (rng.standard_normal(piece.shape) * 0.2).astype(ml_dtypes.bfloat16)
            continue
        _, inputs, outputs = piece.shape
        arrays[f"{piece.name}_blocks"] = rng.integers(0, 256, (E, outputs, inputs // 32, 16)).astype(np.uint8)
        arrays[f"{piece.name}_scales"] = rng.integers(120, 126, (E, outputs, inputs // 32)).astype(np.uint8)
    save_file(arrays, where / "model.safetensors")
    (where / "config.json").write_text(json.dumps(CONFIG))
    return where, arrays


@pytest.fixture(scope="module")
def stored(folder):
    """Loaded without any of its experts being unpacked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExpertBlocks, "read", None)
        return load_model(resolve(str(folder[0])), quantization="stored", progress=False)


def test_kept_as_they_are_stored_and_computed_so(folder, stored):
    """With their biases and the activation that no kernel has, against the same numbers in float32."""
    plain = load_model(resolve(str(folder[0])), progress=False)
    got, wanted = (loaded.model.layers[0].mlp.experts for loaded in (stored, plain))
    for name in ("gate_up", "down"):
        weight = getattr(got, name).get_value()
        assert isinstance(weight, BlockWeight) and weight.bytes_N.nbytes < 0.65 * math.prod(weight.shape)
        dense = getattr(wanted, name).get_value()
        np.testing.assert_array_equal(weight.dequantize().reshape(dense.shape), dense)
    assert isinstance(stored.model.layers[0].attn.qkv.weight.get_value(), PackedInt8Weight)
    rng = np.random.default_rng(1)
    for T in (1, 9):
        x = jax.numpy.asarray(rng.standard_normal((T, D)) * 3, np.float32)  # some gates and ups beyond their limit
        ids = np.stack([rng.permutation(E)[:2] for _ in range(T)]).astype(np.int32)
        shares = jax.numpy.asarray(rng.random((T, 2)), np.float32)
        dense = np.asarray(wanted(x, ids, shares))
        np.testing.assert_allclose(got(x, ids, shares), dense, atol=0.02 * np.abs(dense).max())


def test_they_count_as_stored_though_attention_is_not(folder):
    checkpoint = open_checkpoint(resolve(str(folder[0]))).checkpoint
    assert count_coded(unfilled(), checkpoint) == 3 * E * D * F


def test_a_damaged_scale_is_told(folder, tmp_path):
    arrays = dict(folder[1])
    scales = arrays[f"{EXPERTS}.down_proj_scales"].copy()
    scales[2, 5, 0] = 255
    save_file(arrays | {f"{EXPERTS}.down_proj_scales": scales}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match=r"down_proj.*a block's scale is not a finite number"):
        load_model(resolve(str(tmp_path)), quantization="stored", progress=False)


def test_the_same_bytes_from_a_gguf_file(folder, stored, tmp_path):
    """Gates and ups apart there, halves of a block in one byte: the same weight."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gpt-oss")
    for name, own in (("gate_up_proj", ("ffn_gate_exps", "ffn_up_exps")), ("down_proj", ("ffn_down_exps",))):
        blocks, scales = (folder[1][f"{EXPERTS}.{name}_{part}"] for part in ("blocks", "scales"))
        values = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
        packed = np.concatenate([scales[..., None], values[..., :16] | values[..., 16:] << 4], axis=-1)
        packed = packed.reshape(*blocks.shape[:2], -1)
        for index, part in enumerate(own):
            rows = np.ascontiguousarray(packed[:, index :: len(own)])
            writer.add_tensor(f"blk.0.{part}.weight", rows, raw_dtype=gguf.GGMLQuantizationType.MXFP4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint, recipes = GGUFCheckpoint(GGUFFile(tmp_path / "x.gguf"), "gpt-oss", 1, None), stored.model.recipes()
    parameters = dict(parameters_of(stored.model))
    fresh = dict(parameters_of(unfilled()))
    for path in ("layers.0.mlp.experts.gate_up", "layers.0.mlp.experts.down"):
        made, kept = coded(recipes[path], fresh[path], checkpoint), parameters[path].get_value()
        assert made is not None and made.stretches == kept.stretches
        np.testing.assert_array_equal(made.bytes_N, kept.bytes_N)
        np.testing.assert_array_equal(recipes[path].make(checkpoint.read), made.dequantize())
