"""What is written beside PEFT directories: GGUF adapters, whole models in several files, `model_type`."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from models.loading.opening import open_checkpoint
from models.loading.source import resolve
from models.registry import families
from serving.training import export
from serving.training.gguf_files import has_gguf_base, write_gguf, write_merged_gguf
from serving.training.lora import LoraSettings
from tests.models.adapters.make import HEADS, KV_HEADS, write_base
from tests.models.tiny_gguf import to_gguf


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


def pairs(folder, rank=3):
    rng = np.random.default_rng(1)
    return {
        name: {"a": rng.standard_normal((rank, x.shape[1])), "b": rng.standard_normal((x.shape[0], rank))}
        for name, x in load_file(folder / "model.safetensors").items()
        if "_proj" in name
    }


@pytest.mark.parametrize("from_gguf", [False, True])
def test_a_gguf_adapter_changes_the_gguf_base_as_the_pairs_change_the_tensors(from_gguf, base, tmp_path):
    to_gguf(base, tmp_path / "base.gguf")
    learned = pairs(base)
    settings = LoraSettings(3, 5.0, rslora=True)
    opened = open_checkpoint(resolve(str(tmp_path / "base.gguf" if from_gguf else base)))
    write_gguf(tmp_path / "adapter.gguf", learned, settings, opened)
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["general.architecture"].contents() == "llama"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    assert len(tensors) == 2 * len(learned)
    stored = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / "base.gguf").tensors}
    plain = load_file(base / "model.safetensors")
    for part, own, heads in (("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", KV_HEADS), ("v_proj", "attn_v", 0)):
        name = f"model.layers.1.self_attn.{part}.weight"
        a, b = (tensors[f"blk.1.{own}.weight.lora_{x}"] for x in "ab")
        changed = stored[f"blk.1.{own}.weight"] + alpha / a.shape[0] * b @ a
        if heads:  # llama.cpp's order of rows back to Hugging Face's
            changed = changed.reshape(heads, -1, 2, changed.shape[1]).swapaxes(1, 2).reshape(changed.shape)
        expected = plain[name] + settings.scale * learned[name]["b"] @ learned[name]["a"]
        np.testing.assert_allclose(changed, expected, atol=1e-4)


def test_a_merged_gguf_is_the_base_with_the_change_in_it(base, tmp_path):
    to_gguf(base, tmp_path / "base.gguf")
    learned = {name: pair for name, pair in pairs(base).items() if "layers.1" in name}
    settings, opened = LoraSettings(3, 5.0), open_checkpoint(resolve(str(tmp_path / "base.gguf")))
    assert has_gguf_base(opened) and not has_gguf_base(open_checkpoint(resolve(str(base))))
    for dtype, within in (("float32", 1e-5), ("float16", 1e-2), ("bfloat16", 5e-2)):
        path = tmp_path / f"{dtype}.gguf"
        assert write_merged_gguf(path, learned, settings, opened, dtype) == len(learned)
        merged = open_checkpoint(resolve(str(path)))
        assert merged.hf_config == opened.hf_config and merged.checkpoint is not None
        for name, plain in load_file(base / "model.safetensors").items():
            pair = learned.get(name)
            expected = plain if pair is None else plain + settings.scale * pair["b"] @ pair["a"]
            found = merged.checkpoint.read(name).astype(np.float32)
            np.testing.assert_allclose(found, expected, atol=1e-5 if pair is None else within * np.abs(expected).max())
        kept, new = (gguf.GGUFReader(one).fields for one in (tmp_path / "base.gguf", path))
        for key in kept.keys() - {"general.file_type", "GGUF.kv_count"}:
            assert new[key].contents() == kept[key].contents(), key


def test_a_large_model_is_several_files(base, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "FILE_BYTES", 50_000)
    opened = open_checkpoint(resolve(str(base)))
    tensors = load_file(base / "model.safetensors")
    export.write_model(tmp_path / "out", tensors.items(), opened, "float32")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys() and len(set(index["weight_map"].values())) > 2
    again = open_checkpoint(resolve(str(tmp_path / "out")))
    assert again.checkpoint is not None
    for name, values in tensors.items():
        np.testing.assert_array_equal(again.checkpoint.read(name), values)


def test_model_types_are_those_of_transformers():
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    names = {}
    for mapping in (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_MAPPING_NAMES):
        for kind, architecture in mapping.items():
            names.setdefault(architecture if isinstance(architecture, str) else architecture[0], set()).add(kind)
    ours = {
        name for family in families() if "generate" in family.tasks and family.gguf for name in family.architectures
    }
    checked = ours & names.keys()
    assert len(checked) > 20
    assert {name: export.model_type(name) for name in checked if export.model_type(name) not in names[name]} == {}
