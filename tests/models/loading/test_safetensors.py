import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from models.loading.files.safetensors import SafetensorsCheckpoint, SafetensorsFile, canonical_name


def write(path, header: dict | bytes, data: bytes, claimed: int | None = None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if claimed is None else claimed).to_bytes(8, "little") + raw + data)
    return path


def test_reads_what_the_library_writes(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4).astype(ml_dtypes.bfloat16),
        "c": np.zeros((0, 3), np.float16),
    }
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert set(checkpoint.own_names) == set(arrays)
    for name, wanted in arrays.items():
        assert checkpoint.shape(name) == wanted.shape
        read = checkpoint.read(name)
        assert read.dtype == wanted.dtype
        np.testing.assert_array_equal(read, wanted)
    assert checkpoint.locate("d") is None


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "data", "claimed", "said"),
    [
        ({"a": ENTRY}, bytes(15), None, "truncated"),
        ({"a": ENTRY | {"shape": [2, 3]}}, bytes(16), None, "needs 24 bytes"),
        ({"a": ENTRY | {"shape": [2**40, 2**40]}}, bytes(16), None, "needs"),
        ({"a": ENTRY | {"data_offsets": [-16, 0]}}, bytes(16), None, "not sizes"),
        ({"a": ENTRY | {"dtype": "F33"}}, bytes(16), None, "F33"),
        ({"a": {"dtype": "F32"}}, bytes(16), None, "malformed"),
        ({"a": ENTRY}, bytes(16), 1 << 40, "claims"),
        (b"{nonsense", b"", None, "not JSON"),
        ('{"a": 1}'.encode("utf-32-be"), b"", None, "not JSON"),
        (b"\xff{}", b"", None, "not UTF-8"),
        (b"[1]", b"", None, "not a JSON object"),
    ],
)
def test_a_lying_header_is_told(tmp_path, header, data, claimed, said):
    with pytest.raises(ValueError, match=said):
        SafetensorsFile(write(tmp_path / "model.safetensors", header, data, claimed))


def test_tiny_file(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match="3 bytes"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_sharded_index(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "one.safetensors")
    save_file({"b": np.ones(3, np.float32)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(SafetensorsCheckpoint(tmp_path).own_names) == {"a", "b"}
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ValueError, match=r"two\.safetensors.*incomplete"):
        SafetensorsCheckpoint(tmp_path)


def test_index_cannot_lead_out_of_the_directory(tmp_path):
    (tmp_path / "in").mkdir()
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "out.safetensors")
    (tmp_path / "in" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../out.safetensors"}}')
    with pytest.raises(ValueError, match=r"names \.\./out\.safetensors, which is not in"):
        SafetensorsCheckpoint(tmp_path / "in")


def test_no_weights(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pickle"):
        SafetensorsCheckpoint(tmp_path)


def test_wrappers_around_a_language_model():
    assert canonical_name("language_model.model.layers.0.x") == "model.layers.0.x"
    assert canonical_name("model.language_model.norm.weight") == "model.norm.weight"
    assert canonical_name("language_model.lm_head.weight") == "lm_head.weight"
    assert canonical_name("model.layers.0.x") == "model.layers.0.x"
