import os

import gguf
import numpy as np
import pytest

from models.config import from_hf
from models.loading.gguf import config as gguf_config
from models.loading.gguf.checkpoint import GGUFCheckpoint, half_split_rows
from models.loading.gguf.file import DECODED, GGUFFile, open_gguf
from models.loading.source import resolve


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


def test_headers_are_read_once_while_somebody_has_them(written, tmp_path):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(written[0].read_bytes())
    first = open_gguf(copy)
    assert open_gguf(copy) is first and first.metadata["note"] == "grüße"
    os.utime(copy, (1, 1))
    assert open_gguf(copy) is not first, "another file by now"
    copy.write_bytes(b"GGUF")
    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            open_gguf(copy)


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


@pytest.mark.parametrize("kind", sorted(DECODED), ids=lambda kind: kind.name)
def test_every_block_type(kind, tmp_path):
    """Any bytes are blocks of some values (scales apart): ours are those of gguf.quants, groups of blocks joined right."""
    rng = np.random.default_rng(int(kind))
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = 3, block * max(2, 8192 // block)
    raw = rng.integers(0, 256, (rows * 40, columns // block * block_bytes), np.uint8)
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        got = GGUFFile(path).read("t")
        wanted = gguf.quants.dequantize(raw, kind)
    assert got.shape == (rows * 40, columns)
    np.testing.assert_array_equal(got.astype(np.float32), wanted.reshape(got.shape))


def test_a_block_type_that_cannot_be_decoded_is_named(tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", np.zeros((1, 292), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="Q8_K"):
        GGUFFile(path)


def write_split(folder, arrays, parts=3, claimed=None):
    """A model's tensors dealt out over files, as llama.cpp's gguf-split names and marks them."""
    paths = [folder / f"m-{n + 1:05d}-of-{parts:05d}.gguf" for n in range(parts)]
    names = list(arrays)
    for n, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        if n == 0:
            writer.add_string("note", "of the model")
        writer.add_uint16("split.no", n)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(names) if claimed is None else claimed)
        for name in names[n::parts]:
            writer.add_tensor(name, arrays[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_a_split_model_in_the_hubs_cache(tmp_path):
    """There a file's name is a link, and what it leads to is called by its digest."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    arrays = {f"t{i}": np.full((1, 32), i, np.float32) for i in range(5)}
    for path in write_split(tmp_path, arrays):
        blob = path.rename(tmp_path / "blobs" / f"{hash(path.name):x}")
        (tmp_path / "snapshot" / path.name).symlink_to(blob)
    for asked in (tmp_path / "snapshot", tmp_path / "snapshot" / "m-00001-of-00003.gguf"):
        assert GGUFFile(resolve(str(asked)).path).tensors.keys() == arrays.keys()


def scaling_of(tmp_path, **keys):
    """The rotary embedding of a GGUF file with this metadata of its architecture."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for key, value in {
        "block_count": 1,
        "embedding_length": 64,
        "attention.head_count": 4,
        "context_length": 4096,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    for key, value in keys.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"llama.rope.scaling.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((8, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = from_hf(gguf_config.config_dict(GGUFFile(tmp_path / "x.gguf"), "LlamaForCausalLM"))
    return config.rope, config.max_positions


def test_yarns_attention_factor(tmp_path):
    """The converter writes Hugging Face's `attention_factor` under this key."""
    rope, _ = scaling_of(tmp_path, type="yarn", factor=4.0, original_context_length=1024.0, yarn_attn_factor=1.25)
    assert (rope.kind, rope.factor, rope.attention_factor) == ("yarn", 4.0, 1.25)


def test_a_files_context_is_the_stretched_one(tmp_path):
    rope, positions = scaling_of(tmp_path, type="linear", factor=4.0)
    assert (rope.kind, rope.factor, positions) == ("linear", 4.0, 4096)


def test_a_split_model_is_read_from_any_of_its_files(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.standard_normal((i + 1, 32)).astype(np.float32) for i in range(7)}
    paths = write_split(tmp_path, arrays)
    for path in paths:
        file = GGUFFile(path)
        assert file.metadata["note"] == "of the model"
        assert file.tensors.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.read(name), array)
    assert resolve(str(tmp_path)).path == paths[0]
    (tmp_path / "other.gguf").write_bytes(paths[0].read_bytes())
    with pytest.raises(ValueError, match="4 GGUF files"):
        resolve(str(tmp_path))
    with pytest.raises(ValueError, match="not named like one of them"):
        GGUFFile(tmp_path / "other.gguf")
    paths[1].unlink()
    with pytest.raises(ValueError, match=r"m-00002-of-00003\.gguf is not there"):
        GGUFFile(paths[2])


def test_a_split_that_lacks_tensors(tmp_path):
    paths = write_split(tmp_path, {"a": np.ones((1, 32), np.float32), "b": np.ones((1, 32), np.float32)}, 2, claimed=3)
    with pytest.raises(ValueError, match="2 tensors, not the 3"):
        GGUFFile(paths[0])


@pytest.mark.parametrize("architecture", ["qwen3moe", "mistral4"])
def test_experts_whose_gate_and_up_are_one_tensor(tmp_path, architecture):
    """As the converter writes them where it leaves them together: an expert's half is read alone, and stays in its blocks."""
    E, F, D = 3, 32, 64
    values = np.random.default_rng(0).standard_normal((E, 2 * F, D)).astype(np.float32)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", architecture)
    writer.add_tensor("blk.0.ffn_gate_up_exps.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = GGUFCheckpoint(open_gguf(tmp_path / "x.gguf"), architecture, 1, None)
    stored = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    for part, rows in (("gate_proj", slice(F)), ("up_proj", slice(F, 2 * F))):
        name = f"model.layers.0.mlp.experts.1.{part}.weight"
        assert checkpoint.shape(name) == (F, D)
        np.testing.assert_array_equal(checkpoint.read(name), stored[1, rows])
        found = checkpoint.coded(name)
        assert found is not None and found[1] is not None
        np.testing.assert_array_equal(found[0].rows_RB[found[1]], packed[1, rows])
    assert checkpoint.locate("model.layers.0.mlp.experts.3.gate_proj.weight") is None
