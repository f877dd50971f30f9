"""Tiny random checkpoints that several tests of models read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.tiny_reference import make_reference, slug


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """name -> the directory of its checkpoint, made once for all test processes."""
    shared = tmp_path_factory.getbasetemp().parent / "tiny-models"
    shared.mkdir(exist_ok=True)

    def reference(name: str) -> Path:
        target = shared / slug(name)
        if not target.exists():
            making = tmp_path_factory.mktemp("making")
            make_reference(name, making)
            try:
                making.rename(target)
            except OSError:  # another process was faster
                assert target.exists()
        return target

    return reference
