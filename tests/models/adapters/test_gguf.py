"""Adapters as GGUF: the same matrices as the directory that they were made of, and what is refused."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from models.adapters.adapter import Base
from models.adapters.peft import read_peft
from models.adapters.read import read_adapter
from tests.models.adapters.gguf_form import write_gguf_adapter
from tests.models.adapters.make import HEADS, KV_HEADS, LAYERS, SIZES, write_adapter, write_base

TENSORS = tuple(f"model.layers.{layer}.{name}.weight" for layer in range(LAYERS) for name in SIZES)
BASE = Base((*TENSORS, "model.embed_tokens.weight", "lm_head.weight"), LAYERS, (HEADS, KV_HEADS))


def test_the_same_matrices_as_the_directory(tmp_path):
    """Rows of q and k are interleaved in the file, an embedding is turned."""
    base = write_base(tmp_path / "base")
    folder = write_adapter(tmp_path / "a", embedding=True, head=True)
    wanted = read_peft(folder)
    file = write_gguf_adapter(folder, base, tmp_path / "adapter.gguf")
    for path in (file, file.parent):  # a directory with one file is that file
        found = read_adapter(path, BASE)
        assert found.pairs.keys() == wanted.pairs.keys() and len(found.pairs) == 16
        for name, pair in wanted.pairs.items():
            np.testing.assert_array_equal(found.pairs[name].a_rI, pair.a_rI, err_msg=name)
            np.testing.assert_allclose(found.pairs[name].b_Or, pair.b_Or, rtol=1e-6, err_msg=name)
        assert found.digest() == wanted.digest(), "one content, one adapter"


def written(path, tensors, **facts):
    facts = {"general.type": "adapter", "adapter.type": "lora"} | facts
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in facts.items():
        writer.add_string(key, value)
    writer.add_float32("adapter.lora.alpha", 8.0)
    for name, array in tensors.items():
        writer.add_tensor(name, np.asarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


A, B = "blk.0.ffn_up.weight.lora_a", "blk.0.ffn_up.weight.lora_b"
GOOD = {A: np.ones((4, 48)), B: np.ones((96, 4))}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({A: GOOD[A]}, "comes without its lora_b"),
        ({B: GOOD[B]}, "comes without its lora_a"),
        (GOOD | {"blk.9.ffn_up.weight.lora_a": GOOD[A]}, "changes no weight"),
        (GOOD | {"blk.0.attn_norm.weight": np.ones(48)}, "whole tensor"),
        ({A: GOOD[A], B: np.ones((96, 3))}, "have shapes"),
        ({A: GOOD[A], B: np.full((96, 4), np.inf)}, "not finite"),
        ({A: np.ones((3, 4, 48)), B: np.ones((3, 96, 4))}, "have shapes"),
        ({"blk.0.attn_q.weight.lora_a": GOOD[A], "blk.0.attn_q.weight.lora_b": np.ones((97, 4))}, "6 heads do not divide"),
    ],
)  # fmt: skip
def test_what_would_be_served_wrongly_is_refused(tmp_path, tensors, says):
    with pytest.raises(ValueError, match=says):
        read_adapter(written(tmp_path / "a.gguf", tensors), BASE)


def test_files_that_are_no_adapters(tmp_path):
    with pytest.raises(ValueError, match="not a LoRA adapter"):
        read_adapter(written(tmp_path / "a.gguf", GOOD, **{"general.type": "model"}), BASE)
    with pytest.raises(ValueError, match="holds no tensors"):
        read_adapter(written(tmp_path / "b.gguf", {}), BASE)
    with pytest.raises(ValueError, match="holds 2 GGUF files"):
        read_adapter(tmp_path, BASE)
    (tmp_path / "c.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="damaged or truncated"):
        read_adapter(tmp_path / "c.gguf", BASE)
    with pytest.raises(ValueError, match="leads out of the folder"):
        read_adapter(tmp_path / "a.gguf", BASE, within=tmp_path / "elsewhere")
