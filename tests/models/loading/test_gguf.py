import gguf
import numpy as np
import pytest

from models.loading.gguf import GGUFFile
from models.loading.gguf_checkpoint import half_split_rows


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_string("note", "grüße")
    writer.add_array("words", ["a", "", "ccc"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float32("eps", 0.5)
    writer.add_bool("yes", True)
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((3, 64)).astype(np.float32)
    writer.add_tensor("plain", plain)
    writer.add_tensor("half", plain.astype(np.float16))
    stacked = rng.standard_normal((2, 4, 64)).astype(np.float32)
    packed = gguf.quants.quantize(stacked, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, plain, gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)


def test_metadata_and_tensors(written):
    path, plain, stacked = written
    file = GGUFFile(path)
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["note"] == "grüße"
    assert file.metadata["words"] == ["a", "", "ccc"]
    assert file.metadata["numbers"].tolist() == [1, 2, 3]
    assert file.metadata["eps"] == 0.5
    assert file.metadata["yes"] is True
    np.testing.assert_array_equal(file.read("plain"), plain)
    np.testing.assert_array_equal(file.read("half"), plain.astype(np.float16))
    np.testing.assert_array_equal(file.read("packed"), stacked)
    np.testing.assert_array_equal(file.read("packed", index=1), stacked[1])


def test_cut_anywhere_it_is_a_value_error(written, tmp_path):
    path, _, _ = written
    whole = path.read_bytes()
    for size in [*range(1, len(whole) - 40, 37), len(whole) - 40]:
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"truncated|damaged|not a GGUF"):
            GGUFFile(cut)


def test_other_files_and_versions(tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="not a GGUF"):
        GGUFFile(other)
    other.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(100))
    with pytest.raises(ValueError, match="version 9"):
        GGUFFile(other)
    other.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (2**60).to_bytes(8, "little") * 2)
    with pytest.raises(ValueError, match="truncated"):
        GGUFFile(other)


def test_half_split_undoes_the_converters_permutation():
    heads, width = 3, 8
    rows = np.arange(heads * width * 2).reshape(heads * width, 2)
    # llama.cpp's convert_hf_to_gguf: (first half, second half) of each head become neighbours.
    permuted = rows.reshape(heads, 2, width // 2, 2).swapaxes(1, 2).reshape(rows.shape)
    np.testing.assert_array_equal(half_split_rows(permuted, heads), rows)
