"""Hub ids against a hub on this machine: what is fetched, what is not, and what is said."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from safetensors.numpy import save

from models.loading import hub
from models.loading.load import load_model, resolve
from tests.models.loading.gguf.test_gguf import write_split
from tests.models.loading.test_load import HF, tensors

SHA = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Repositories of files in memory, with the routes and headers that huggingface_hub asks for.

    Attributes:
        repos: owner/name -> file -> bytes.
        fetched: files whose content was sent.
        ranges: the Range headers that came.
        cut: files of which only so many bytes are sent the first time.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.fetched: list[str] = []
        self.ranges: list[str] = []
        self.cut: dict[str, int] = {}


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def answer(self, body):
        path = self.path.partition("?")[0].strip("/").replace("%2F", "/")
        if path.startswith("api/models/"):
            repo = "/".join(path.split("/")[2:4])
            files = self.server.repos.get(repo)
            if files is None:
                return self.reply(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            if "/tree/" in path:
                tree = [{"type": "file", "path": n, "size": len(d), "oid": SHA} for n, d in files.items()]
                return self.reply(200, json.dumps(tree).encode(), {})
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            return self.reply(200, json.dumps({"id": repo, "sha": SHA, "siblings": siblings}).encode(), {})
        repo, name = "/".join(path.split("/")[:2]), path.split("/resolve/")[-1].partition("/")[2]
        data = self.server.repos.get(repo, {}).get(name)
        if data is None:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if not body:
            return self.reply(200, data, headers, send=False)
        self.server.fetched.append(name)
        start = 0
        if asked := self.headers.get("Range"):
            self.server.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        stop = self.server.cut.pop(name, None)
        return self.reply(206 if start else 200, data[start:], headers, stop=stop)

    def reply(self, status, data, headers, send=True, stop=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if send:
            self.wfile.write(data if stop is None else data[:stop])
        if stop is not None:
            self.close_connection = True


@pytest.fixture
def fake(tmp_path, monkeypatch):
    from huggingface_hub import constants

    server = FakeHub()
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.02), daemon=True)
    thread.start()
    monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def saved() -> bytes:
    return save(tensors(np.random.default_rng(0)))


def test_only_what_is_needed_is_fetched(fake):
    index = json.dumps(
        {"weight_map": dict.fromkeys(tensors(np.random.default_rng(0)), "model-00001-of-00001.safetensors")}
    )
    wanted = {
        "config.json": json.dumps(HF).encode(),
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": index.encode(),
        "model-00001-of-00001.safetensors": saved(),
        "1_Pooling/config.json": b'{"pooling_mode": "mean"}',
        "modules.json": b"[]",
    }
    unwanted = {
        "original/consolidated.00.pth": b"x",
        "original/params.json": b"{}",
        "consolidated.safetensors": b"x",
        "onnx/model.onnx": b"x",
        "pytorch_model.bin": b"x",
        "model-Q4_K_M.gguf": b"x",
        "README.md": b"x",
    }
    fake.repos["o/m"] = wanted | unwanted
    loaded = load_model(resolve("o/m"), progress=False)
    assert loaded.model_id == "o/m"
    assert set(fake.fetched) == set(wanted)
    fake.fetched.clear()
    resolve("o/m")
    assert fake.fetched == []


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["model.safetensors", "model.fp16.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (
            ["params.json", "tekken.json", "consolidated.safetensors"],
            ["params.json", "tekken.json", "consolidated.safetensors"],
        ),
        (["a.safetensors", "adapter_model.safetensors", "tokenizer.model"], ["a.safetensors", "tokenizer.model"]),
    ],
)
def test_which_weights(fake, files, wanted):
    fake.repos["o/m"] = {"config.json": b"{}"} | {name: name.encode() for name in files}
    hub.fetch("o/m")
    assert set(fake.fetched) == {"config.json", *wanted}


def test_pickles_are_named(fake):
    fake.repos["o/m"] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(ValueError, match=r"neither safetensors nor GGUF files\. pytorch_model\.bin is a pickle"):
        hub.fetch("o/m")


GGUFS = {
    "m-Q4_K_M.gguf": b"GGUF4",
    "m-Q4_K_S.gguf": b"GGUF3",
    "m-UD-Q4_K_XL.gguf": b"GGUFx",
    "m-Q8_0.gguf": b"GGUF8" * 10,
    "mmproj-m-f16.gguf": b"GGUF",
    "README.md": b"x",
}


@pytest.mark.parametrize(
    ("asked", "file"),
    [
        ("o/m:Q4_K_M", "m-Q4_K_M.gguf"),
        ("o/m:q8_0", "m-Q8_0.gguf"),
        ("o/m:UD-Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
        ("o/m:m-Q4_K_S.gguf", "m-Q4_K_S.gguf"),
        ("o/m/m-Q4_K_S.gguf", "m-Q4_K_S.gguf"),
    ],
)
def test_a_gguf_by_its_quantization_or_name(fake, asked, file):
    fake.repos["o/m"] = GGUFS
    source = resolve(asked)
    assert (source.kind, source.path.name, source.name) == ("gguf", file, asked)
    assert fake.fetched == [file]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("o/m", "holds 4 GGUF models"),
        ("o/m:Q5_K_M", r"has no GGUF file 'Q5_K_M'; it holds 4"),
        ("o/m:Q4_K", "holds 3 GGUF models"),
    ],
)
def test_a_list_of_what_there_is(fake, asked, said):
    fake.repos["o/m"] = GGUFS
    with pytest.raises(ValueError, match=said) as told:
        resolve(asked)
    assert "o/m:Q4_K_M  0.0 GB" in str(told.value)
    assert "mmproj" not in str(told.value)
    assert fake.fetched == []


def test_the_only_gguf_needs_no_name(fake):
    fake.repos["o/m"] = {"m-Q4_0.gguf": b"GGUF", "mmproj-m.gguf": b"GGUF"}
    assert resolve("o/m").path.name == "m-Q4_0.gguf"


def test_a_split_gguf(fake, tmp_path):
    (tmp_path / "parts").mkdir()
    arrays = {f"t{i}": np.full((1, 32), i, np.float32) for i in range(5)}
    paths = write_split(tmp_path / "parts", arrays)
    fake.repos["o/m"] = {f"Q6_K/{path.name}": path.read_bytes() for path in paths} | {"Q8_0/m.gguf": b"GGUF"}
    from models.loading.gguf.file import GGUFFile

    assert GGUFFile(resolve("o/m:Q6_K").path).tensors.keys() == arrays.keys()
    assert len(fake.fetched) == len(paths)


def test_what_was_cut_off_goes_on_where_it_was(fake):
    data = bytes(range(256)) * 100_000
    fake.repos["o/m"] = {"m-Q8_0.gguf": b"GGUF" + data}
    fake.cut["m-Q8_0.gguf"] = 22_000_000
    assert resolve("o/m").path.read_bytes() == b"GGUF" + data
    assert any(not asked.startswith("bytes=0-") for asked in fake.ranges)


def test_without_the_hub_what_is_cached_is_used(fake, monkeypatch):
    fake.repos["o/m"] = GGUFS
    found = resolve("o/m:Q8_0").path
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve("o/m:Q8_0").path == found
    with pytest.raises(ValueError, match="the hub cannot be reached, and the checkpoint is not in the local cache"):
        resolve("o/other")


def test_offline_as_the_environment_says(fake, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"some/model.*cannot be reached.*--model"):
        resolve("some/model")


def test_what_does_not_exist(fake):
    with pytest.raises(ValueError, match=r"'o/none' could not be fetched: it does not exist"):
        resolve("o/none")


def test_ids():
    for text in ("o/m", "o-x/m.1", "o/m:Q4_K_M", "o/m:a.gguf", "o/m/a.gguf", "o/m:sub/a.gguf"):
        assert hub.looks_like_hub_id(text), text
    for text in ("m", "./m", "o/m/x", "/o/m", "o/m:", "o/m/../a.gguf/", "http://o/m"):
        assert not hub.looks_like_hub_id(text), text
