"""Where compiled programs are kept: a folder that cannot be written is said with its flag, and the start goes on."""

from __future__ import annotations

import os

import pytest

from serving.boot.platform import programs_folder
from serving.engine.api.config import EngineConfig


def folder_of(config, said=None):
    return programs_folder(config, (said if said is not None else []).append)


def test_named_or_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path / "cache"))
    said = []
    assert folder_of(EngineConfig(), said) == tmp_path / "cache/programs" and (tmp_path / "cache/programs").is_dir()
    assert folder_of(EngineConfig(compile_cache=str(tmp_path / "own")), said) == tmp_path / "own"
    assert folder_of(EngineConfig(compile_cache=""), said) is None
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700, "loading a program runs its code"
    assert not said


@pytest.mark.parametrize("named", [True, False])
def test_one_that_cannot_be_made_keeps_nothing(tmp_path, monkeypatch, named):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path / "file"))
    said = []
    assert folder_of(EngineConfig(compile_cache=str(tmp_path / "file/programs") if named else None), said) is None
    assert "--compile-cache" in said[0] and "JAXSERVE_CACHE" in said[0] and "every start compiles them anew" in said[0]


def test_a_read_only_one_is_read(tmp_path, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))
    said = []
    assert folder_of(EngineConfig(compile_cache=str(tmp_path)), said) == tmp_path
    assert "it is read-only" in said[0] and "those that lie there are used" in said[0]
