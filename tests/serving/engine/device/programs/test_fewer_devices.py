"""Executables of a mesh that leaves devices of the machine alone, kept and loaded again."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import pathlib, sys
import jax
jax.config.update("jax_num_cpu_devices", 3)
import jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from serving.engine.device.programs.compiling import ProgramCache

cache = ProgramCache(pathlib.Path(sys.argv[1]), "test")
for count in (1, 2, 3):
    mesh = Mesh(np.array(jax.devices()[::-1][:count]), ("model",))
    x = jax.device_put(jnp.arange(6.0), NamedSharding(mesh, PartitionSpec("model")))
    cache.store(f"on {count}", jax.jit(lambda x: x + 1).lower(x).compile())
    loaded = cache.load(f"on {count}")
    np.testing.assert_array_equal(loaded(x), np.arange(6.0) + 1)
    assert loaded(x).sharding.device_set == x.sharding.device_set
"""

CACHE = "JAX_COMPILATION_CACHE_DIR"  # what comes out of jax's own cache cannot be written once more


def test_a_mesh_of_fewer_devices_than_there_are(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        env={name: value for name, value in os.environ.items() if name != CACHE} | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
