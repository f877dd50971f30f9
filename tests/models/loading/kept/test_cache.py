"""Weights kept between starts: the same as those converted, in the file's own memory; and files that are not what was written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest

from models.loading.kept import ahead
from models.loading.kept import cache as kept_cache
from models.loading.kept import file as kept_file
from models.loading.kept.cache import WeightCache
from models.loading.load import build_model, load_kept, load_model, resolve, weight_files
from models.loading.opening import open_checkpoint
from models.parameters import parameters_of
from ops import native
from tests.tiny_checkpoint import write_tiny_checkpoint

SCHEMES = ("int8", "int4") if native.available() else ("int8",)


@pytest.fixture(autouse=True, scope="module")
def disk():
    """Half empty, whatever the machine's is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_cache.shutil, "disk_usage", lambda _: usage(100, 50))
        yield


def usage(total: float, free: float):
    """As `shutil.disk_usage` tells it; in GiB."""
    return SimpleNamespace(total=int(total * kept_cache.GIB), free=int(free * kept_cache.GIB))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_tiny_checkpoint(tmp_path / "model")


class Folder(WeightCache):
    def __init__(self, folder: Path, **options):
        self.said: list[str] = []
        super().__init__(folder, say=self.said.append, **{"least": 0, **options})

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.suffix != kept_cache.NOTE)


def weights(checkpoint: Path, kept: WeightCache | None = None, quantization: str | None = "int8") -> dict:
    model = load_model(resolve(str(checkpoint)), quantization=quantization, progress=False, kept=kept).model
    if kept is not None:
        kept.finish()
    return {path: parameter.get_value() for path, parameter in parameters_of(model)}


def assert_same(some: dict, others: dict) -> None:
    assert jax.tree.structure(some) == jax.tree.structure(others)
    for one, other in zip(jax.tree.leaves(some), jax.tree.leaves(others), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_second_load_maps_what_the_first_one_made(checkpoint, tmp_path, monkeypatch, scheme):
    kept = Folder(tmp_path / "kept")
    first = weights(checkpoint, kept, scheme)
    (file,) = kept.files()
    assert "weights kept" in kept.said[0] and kept.folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr("models.loading.load.fill", lambda *_, **__: pytest.fail("the checkpoint was converted again"))
    mapped = weights(checkpoint, kept, scheme)
    assert_same(first, mapped)
    assert_same(weights(checkpoint, kept, scheme), first)
    places = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line
    ]
    for leaf in jax.tree.leaves(mapped):
        assert any(int(a, 16) <= leaf.unsafe_buffer_pointer() < int(b, 16) for a, b in places) or leaf.size == 0


def test_what_the_system_maps_in_small_pages_is_copied(checkpoint, tmp_path, monkeypatch):
    """Into huge ones; which files are, and whether there are such, is the system's."""
    kept = Folder(tmp_path / "kept")
    first = weights(checkpoint, kept)
    for small in (False, True):
        monkeypatch.setattr(kept_file, "LEAST_COPIED", 0)
        monkeypatch.setattr(kept_file, "_in_small_pages", lambda _, small=small: small)
        monkeypatch.setattr(kept_file.buffers, "huge_pages", lambda: True)
        assert_same(weights(checkpoint, kept), first)


def test_which_mappings_are_in_small_pages(tmp_path, monkeypatch):
    """What the system says of other mappings, behind and in front, does not count."""
    data = np.zeros(8, np.uint8)
    fields = "Size: {0} kB\nRss: {0} kB\nFilePmdMapped: {1} kB\nVmFlags: rd wr mr\n"
    monkeypatch.setattr(kept_file, "SMAPS", tmp_path / "smaps")
    for huge, small in ((1000, False), (700, True)):
        mappings = [("10-20", 100, 100), (f"{data.ctypes.data:x}-ffff", 1000, huge), ("30-40", 4, 4)]
        said = (f"{place} rw-p 0 fe:00 7 /a file\n{fields.format(rss, pmd)}" for place, rss, pmd in mappings)
        kept_file.SMAPS.write_text("".join(said))
        assert kept_file._in_small_pages(data) is small
    kept_file.SMAPS.unlink()
    assert not kept_file._in_small_pages(data)


def test_a_wake_maps_what_the_start_has_kept(checkpoint, tmp_path):
    kept, opened = Folder(tmp_path / "kept"), open_checkpoint(resolve(str(checkpoint)))

    def woken() -> dict | None:
        found = load_kept(opened, build_model(opened), "int8", kept)
        return None if found is None else {path: one.get_value() for path, one in parameters_of(found.model)}

    assert woken() is None
    first = weights(checkpoint, kept)
    for _ in range(2):
        found = woken()
        assert found is not None
        assert_same(found, first)
    os.utime(next(checkpoint.glob("*.safetensors")), (1, 1))
    assert woken() is None, "the headers are of another file by now"


def test_dense_values(tmp_path):
    array = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    named = {"a": array, "b": array.astype(ml_dtypes.bfloat16), "c": np.zeros((0,), np.float32)}
    kept_file.write(tmp_path / "w", "key", named)
    found = kept_file.read(tmp_path / "w", "key")
    assert list(found) == list(named)
    for name, value in named.items():
        assert found[name].dtype == value.dtype and found[name].ctypes.data % 64 == 0
        np.testing.assert_array_equal(found[name], value)


def test_what_counts(checkpoint, tmp_path):
    kept = Folder(tmp_path / "kept")
    files = list(checkpoint.iterdir())
    key = kept.key(files, {"quantization": "int8"})
    assert key == kept.key(files, {"quantization": "int8"})
    assert key != kept.key(files, {"quantization": "int4"})
    stamp = (checkpoint / "model.safetensors").stat().st_mtime
    os.utime(checkpoint / "model.safetensors", (stamp, stamp + 1))
    assert key != kept.key(files, {"quantization": "int8"})


def test_plain_floats_are_not_kept(checkpoint, tmp_path):
    kept = Folder(tmp_path / "kept")
    weights(checkpoint, kept, None)
    weights(checkpoint, Folder(tmp_path / "small", least=1 << 30))
    assert not (tmp_path / "kept").exists() and not (tmp_path / "small").exists()


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def describe_anew(path: Path, change) -> None:
    """As somebody would who knows the format: the head fits, what it says does not."""
    data = path.read_bytes()
    offset = int.from_bytes(data[16:24], "little")
    described = json.loads(data[offset:])
    change(described)
    text = json.dumps(described).encode()
    path.write_bytes(kept_file._head(offset, text) + data[kept_file.HEAD : offset] + text)


def first_array(described: dict) -> list:
    return next(iter(next(iter(described["parameters"].values()))["arrays"].values()))


DAMAGE = {
    "empty": lambda path: cut(path, 0),
    "the head alone": lambda path: cut(path, 40),
    "half": lambda path: cut(path, path.stat().st_size // 2),
    "one byte too few": lambda path: cut(path, path.stat().st_size - 1),
    "one too many": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "magic": lambda path: flip(path, 3),
    "where the description begins": lambda path: flip(path, 23),
    "digest": lambda path: flip(path, 40),
    "a weight": lambda path: flip(path, 1000),
    "the description": lambda path: flip(path, path.stat().st_size - 9),
    "another key": lambda path: describe_anew(path, lambda d: d.update(key="other")),
    "no parameters": lambda path: describe_anew(path, lambda d: d.pop("parameters")),
    "a list": lambda path: describe_anew(path, lambda d: d.update(parameters=[1])),
    "another kind": lambda path: describe_anew(path, lambda d: next(iter(d["parameters"].values())).update(kind="x")),
    "beyond the end": lambda path: describe_anew(path, lambda d: first_array(d).__setitem__(1, [1 << 40])),
    "before the beginning": lambda path: describe_anew(path, lambda d: first_array(d).__setitem__(2, -64)),
    "of a negative size": lambda path: describe_anew(path, lambda d: first_array(d).__setitem__(1, [-64])),
    "a dtype there is not": lambda path: describe_anew(path, lambda d: first_array(d).__setitem__(0, "float7")),
    "objects": lambda path: describe_anew(path, lambda d: first_array(d).__setitem__(0, "object")),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint, its weights, and the bytes that keep them."""
    folder = tmp_path_factory.mktemp("written")
    checkpoint = write_tiny_checkpoint(folder / "model")
    kept = Folder(folder / "kept")
    made = weights(checkpoint, kept)
    (file,) = kept.files()
    return checkpoint, made, file.name, file.read_bytes()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_thrown_away_and_made_anew(written, tmp_path, damage):
    checkpoint, made, name, data = written
    kept = Folder(tmp_path / "kept")
    kept.folder.mkdir()
    (kept.folder / name).write_bytes(data)
    DAMAGE[damage](kept.folder / name)
    key = name.removesuffix(kept_cache.SUFFIX)
    assert kept.read(key) is None
    assert "damaged" in kept.said[0] and not kept.files()
    if damage == "a weight":
        assert_same(weights(checkpoint, kept), made)
        assert [file.name for file in kept.files()] == [name]


def test_what_was_not_used_for_longest_goes(tmp_path):
    array = np.ones(1 << 18, np.float32)  # 1 MiB
    kept = Folder(tmp_path, limit=int(2.5 * (1 << 20)))
    for name in ("old", "older", "new"):
        kept.keep(name, {"a": array})
        kept.finish()
        for used, path in enumerate(kept.files()):
            os.utime(path, (used, {"old": 200, "older": 100, "new": 300}[path.stem]))
    assert [path.stem for path in kept.files()] == ["new", "old"]
    assert kept.read("old") is not None
    assert max(kept.files(), key=lambda path: path.stat().st_mtime).stem == "old", "it was used last"
    kept.keep("large", {"a": np.ones(3 << 18, np.float32)})
    assert "not kept" in kept.said[-1] and "--weight-cache-gb" in kept.said[-1]


@pytest.mark.parametrize(
    ("total", "free", "kept_ones"),
    [
        (1000, 8, ["new", "old"]),
        (1000, 4.02, ["new", "old"]),
        (20, 2.02, ["new", "old"]),
        (1000, 4.002, ["new"]),
        (1000, 3, ["old"]),
    ],
    ids=["a large disk, little free", "just enough", "a small one", "once the old one has gone", "not even then"],
)
def test_what_is_left_of_the_disk(tmp_path, monkeypatch, total, free, kept_ones):
    """A tenth, at most 4 GiB; and who could not make room that way throws nothing away."""
    array = np.ones(1 << 20, np.float32)  # 4 MiB
    kept = Folder(tmp_path)
    kept.keep("old", {"a": array})
    kept.finish()
    monkeypatch.setattr(kept_cache.shutil, "disk_usage", lambda _: usage(total, free))
    kept.keep("new", {"a": array})
    kept.finish()
    assert [path.stem for path in kept.files()] == kept_ones
    assert ("not kept" in kept.said[-1]) is ("new" not in kept_ones)


def test_no_room_and_no_right(tmp_path, monkeypatch):
    kept = Folder(tmp_path / "kept")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kept_file.os, "replace", full)
    kept.keep("key", {"a": np.ones(8)})
    kept.finish()
    assert "not kept" in kept.said[0] and "No space left" in kept.said[0] and not kept.files(), "nothing is left behind"
    (tmp_path / "file").write_text("")
    none = Folder(tmp_path / "file/kept")
    none.keep("key", {"a": np.ones(8)})
    assert "not kept" in none.said[0]
    assert none.read("key") is None


def test_what_nobody_finished_goes(tmp_path):
    kept = Folder(tmp_path)
    for name, age in (("a.part", 2 * kept_cache.ABANDONED_S), ("b.part", 0)):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (1, os.stat(tmp_path / name).st_mtime - age))
    kept.keep("key", {"a": np.ones(8)})
    kept.finish()
    assert [path.name for path in kept.files()] == ["b.part", "key.weights"]


def test_what_was_kept_last_is_read_before_anybody_asks_for_it(checkpoint, tmp_path, monkeypatch):
    """Once; and nothing is left of it where other weights are wanted, the note leads out of the folder or to nothing."""
    kept = Folder(tmp_path / "kept")
    first = weights(checkpoint, kept)
    files = weight_files(resolve(str(checkpoint)))
    kept.expect(files)
    (expected,) = ahead._readings
    assert expected.parent == kept.folder
    monkeypatch.setattr(kept_file, "memory_of", lambda _: pytest.fail("it was read again"))
    assert_same(weights(checkpoint, kept), first)
    assert not ahead._readings
    monkeypatch.undo()
    assert_same(weights(checkpoint, kept), first)
    (note,) = kept.folder.glob("*.last")
    for text in ("../" + expected.stem, "0" * 40, ""):
        note.write_text(text)
        kept.expect(files)
        assert not ahead._readings
    note.write_text(expected.stem)
    kept.expect(files)
    kept.finish()
    assert not ahead._readings
