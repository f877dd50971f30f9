"""The folder of compiled programs, on a disk that is full."""

from __future__ import annotations

import errno

import jax
import jax.numpy as jnp
import pytest

from serving.engine.device.programs import compiling


@pytest.mark.parametrize("where", ["while it is written", "when it is whole"])
def test_a_full_disk_stops_nothing_and_is_not_filled_further(tmp_path, monkeypatch, where):
    cache = compiling.ProgramCache(tmp_path / "programs", "x")
    with compiling._kept_out_of_jax_cache():
        compiled = jax.jit(lambda x: x + 1).lower(jnp.zeros(3)).compile()
    full = OSError(errno.ENOSPC, "No space left on device")

    def fails(*args, **more):
        raise full

    with monkeypatch.context() as patch:
        if where == "when it is whole":
            patch.setattr(compiling.os, "replace", fails)
        else:
            real = compiling.tempfile.NamedTemporaryFile

            def file(**how):
                made = real(**how)
                made.write = fails
                return made

            patch.setattr(compiling.tempfile, "NamedTemporaryFile", file)
        cache.store("p", compiled)
        assert not list((tmp_path / "programs").iterdir()) and cache.load("p") is None
    cache.store("p", compiled)
    assert len(list((tmp_path / "programs").iterdir())) == 1
    assert cache.load("p")(jnp.zeros(3)).tolist() == [1.0] * 3
