"""`jaxserve`: its words, its failures in a sentence, the doctor, the caches, completion."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import types

import pytest

from serving.command import cached, completion, doctor
from serving.command.__main__ import HERE, MODULES, main, told


def test_words_are_told_and_wrong_ones_refused(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("serve", "chat", "doctor", "pull", "completion"))
    assert main(["docter"]) == 2 and "Did you mean doctor?" in capsys.readouterr().err
    assert main(["--version"]) == 0 and capsys.readouterr().out.strip()


def test_flags_alone_are_those_of_serve(monkeypatch):
    ran = []
    monkeypatch.setattr(
        "serving.command.__main__.runpy.run_module", lambda name, **more: ran.append((name, sys.argv[1:]))
    )
    assert main(["--port", "1"]) == 0 and main(["serve", "--port", "2"]) == 0
    assert ran == [("serving.launch", ["--port", "1"]), ("serving.launch", ["--port", "2"])]


def test_looking_at_the_words_imports_nothing_heavy():
    code = "import sys; from serving.command.__main__ import main; main(['--help']); print({'jax', 'fastapi'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_failures_are_sentences(capsys, monkeypatch):
    def fails(error: BaseException) -> int:
        def run() -> int:
            raise error

        return told(run)

    assert fails(ValueError("no such model")) == 1
    assert capsys.readouterr().err.startswith("error: no such model\n")
    assert fails(KeyboardInterrupt()) == 130
    monkeypatch.setenv("JAXSERVE_TRACEBACK", "1")
    with pytest.raises(ValueError):
        fails(ValueError("x"))


def test_the_doctor_looks_at_everything(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path / "kept"))
    assert doctor.main(["--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    named = {one["what"] for one in found}
    assert {"python", "cores", "memory", "devices", "HTTP port", "gRPC port", "cache"} <= named
    assert all(one["remedy"] for one in found if one["state"] != "ok")


def test_the_doctor_says_how_much_is_kept_and_how_much_room_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path / "kept"))
    free = 3 * 2**30
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
    (found,) = doctor.caches()
    assert found.state == "ok" and "0 MiB; 3.0 GiB free" in found.text
    (tmp_path / "kept" / "weights").mkdir(parents=True)
    (tmp_path / "kept" / "weights" / "a").write_bytes(bytes(2**20))
    gone = tmp_path / "kept" / "gone"
    real = pathlib.Path.rglob
    monkeypatch.setattr(pathlib.Path, "rglob", lambda path, what: [*real(path, what), gone])  # thrown away meanwhile
    free = 2**30
    (found,) = doctor.caches()
    assert found.state == "note" and "1 MiB; 1.0 GiB free" in found.text and "make room" in found.remedy
    monkeypatch.setattr(doctor.os, "access", lambda path, how: False)
    (found,) = doctor.caches()
    assert found.state == "bad" and "cannot be written" in found.text and "JAXSERVE_CACHE" in found.remedy


@pytest.mark.parametrize(("free", "state"), [(3, "note"), (5, "ok")])
def test_the_doctor_says_how_much_memory_is_free(free, state, monkeypatch):
    monkeypatch.setattr("serving.memory.free_memory", lambda: (free << 30, 8 << 30))
    (found,) = doctor.memory()
    assert (found.state, found.text) == (state, f"{free}.0 of 8.0 GiB free")


def test_the_doctor_says_what_is_bad(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([doctor.Finding("x", "bad", "broken", "mend it.")]),))
    assert doctor.main([]) == 1 and "-> mend it." in capsys.readouterr().out


def test_models_in_caches(tmp_path: pathlib.Path, monkeypatch, capsys):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"x" * 2**21)
    one = cached.Cached("owner/name", 2**21, (file,))
    monkeypatch.setattr(cached, "cached_models", lambda: [one] if file.exists() else [])
    assert cached.main([], "list") == 0 and "2 MiB  owner/name" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not cached"):
        cached.main(["nobody", "-y"], "rm")
    assert cached.main(["owner/name:Q4_K_M", "-y"], "rm") == 0 and not file.exists()
    assert cached.main([], "list") == 0 and "no models" in capsys.readouterr().out


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion(shell, tmp_path: pathlib.Path):
    text = completion.script(shell)
    assert "max-num-seqs" in text and "doctor" in text
    if shell == "bash":
        file = tmp_path / "c"
        file.write_text(text + '\nCOMP_WORDS=(jaxserve do); COMP_CWORD=1; _jaxserve; echo "${COMPREPLY[@]}"\n')
        done = subprocess.run(["bash", str(file)], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "doctor"


def test_every_word_has_its_place():
    for module, _ in HERE.values():
        assert (pathlib.Path(doctor.__file__).parent / f"{module}.py").is_file()
    assert not set(HERE) & set(MODULES)
