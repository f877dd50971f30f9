"""Finding a compiler, saying what is missing, and the loaded library's switches."""

from __future__ import annotations

import fnmatch
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib

import pytest

from ops import native
from ops.native import build


def test_handlers_are_found_in_the_sources():
    assert "jaxserve_int8_linear" in build.handlers()
    assert len(set(build.handlers())) == len(build.handlers())


def test_without_a_compiler_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match="pip install ziglang"):
        build.find_compiler()


def test_the_compiler_named_by_cxx_is_taken_first(monkeypatch, tmp_path):
    compiler = tmp_path / "mycc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -m64")
    assert build.find_compiler() == [str(compiler), "-m64"]


def test_a_compiler_that_fails_is_one_line(monkeypatch, tmp_path):
    compiler = tmp_path / "badcc"
    compiler.write_text("#!/bin/sh\necho 'x.cc:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError) as caught:
        build.build(tmp_path / "cache")
    assert "no such thing" in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("libjaxserve*"))


def test_a_cache_that_cannot_be_written_is_one_line(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    (tmp_path / "file").write_text("")
    with pytest.raises(build.BuildError, match=r"could not be built in .*JAXSERVE_CACHE") as caught:
        build.build(tmp_path / "file" / "cache")
    assert "Errno" not in str(caught.value)


def test_the_environment_says_where_the_library_is_kept(monkeypatch, tmp_path):
    """Where the home folder cannot be written, a container's too, all that is kept lies in one place."""
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift || exit 0; done\necho library > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(build, "prebuilt", lambda: None)
    built = build.build()
    assert built.parent == tmp_path / "kept" / "native" and built.read_text() == "library\n"
    (tmp_path / "kept" / "native").chmod(0o555)
    assert build.build() == built, "what is there needs nothing written"
    (tmp_path / "kept" / "native").chmod(0o755)


def test_a_stopped_build_goes_on(monkeypatch, tmp_path, capfd):
    """What is compiled stays compiled; a result is there whole or not at all; nothing is left behind at the end."""
    told, gone = tmp_path / "told", tmp_path / "gone"
    compiler = tmp_path / "cc"
    compiler.write_text(
        "#!/bin/sh\nfor last; do :; done\n"
        f'case "$*" in *--version*) exit 0;; *lora_generic.cc*) [ -e {gone} ] || {{ echo half > "$last"; kill -9 $$; }};; esac\n'
        f'echo "$last $ZIG_LOCAL_CACHE_DIR" >> {told}\necho object > "$last"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(build, "prebuilt", lambda: None)
    folder = tmp_path / "kept" / "native"
    (folder / "building-libjaxserve-older").mkdir(parents=True)
    with pytest.raises(build.BuildError, match="-9"):
        build.build()
    first = told.read_text().splitlines()
    (work,) = folder.glob("building-*")
    assert not (work / "lora_generic.o").exists() and not list(folder.glob("*.so"))
    gone.touch()
    built = build.build()
    again = told.read_text().splitlines()[len(first) :]
    assert built.read_text() == "object\n" and {path.name for path in folder.iterdir()} == {built.name, ".lock"}
    assert len(first) + len(again) == len(build.sources()) + 1, "each was compiled once, and all linked"
    assert all(line.startswith(str(work)) and line.endswith(f"{work}/zig") for line in (*first, *again))
    said = capfd.readouterr().err
    assert f"once for this machine: {len(build.sources())} files" in said and f", {len(first)} of them compiled" in said


def test_a_library_built_into_the_package_is_taken_first(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho library > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    package = shutil.copytree(build.SOURCES, tmp_path / "native", ignore=shutil.ignore_patterns("libjaxserve-*"))
    monkeypatch.setattr(build, "SOURCES", package)
    assert build.prebuilt() is None
    built = build.build(package)
    assert built.read_text() == "library\n" and build.build() == build.prebuilt() == built


def test_turned_off_by_the_environment():
    code = "from ops import native; assert not native.available(); print(native.status())"
    env = {**os.environ, "JAXSERVE_NATIVE": "0", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "JAXSERVE_NATIVE=0" in done.stdout


@pytest.mark.skipif(not native.available(), reason=native.status())
def test_levels_can_be_lowered_and_restored():
    best = native.set_isa(None)
    try:
        assert native.set_isa("generic") == "generic" and "generic" in native.status()
    finally:
        assert native.set_isa(None) == best
    with pytest.raises(ValueError, match="known ones are generic"):
        native.set_isa("mmx")


def test_a_wheel_carries_what_the_library_is_built_from():
    config = tomllib.loads((pathlib.Path(build.SOURCES).parents[1] / "pyproject.toml").read_text())
    patterns = config["tool"]["setuptools"]["package-data"]["*"]
    needed = [path.name for path in build.SOURCES.iterdir() if path.suffix in (".cc", ".h")]
    assert needed and not [name for name in needed if not any(fnmatch.fnmatch(name, p) for p in patterns)]


def test_every_folder_of_sources_is_a_package():
    """Else a wheel goes without it: package data are of packages."""
    folders = {path.parent for path in build.sources()}
    assert len(folders) > 1 and all((folder / "__init__.py").exists() for folder in folders)
