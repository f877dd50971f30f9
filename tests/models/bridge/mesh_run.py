"""A traced model on a mesh of CPU devices: `python -m tests.models.bridge.mesh_run FOLDER MESH`, with prompts on standard input;
prints their greedy completions. What `test_engine.py` runs in a process of its own."""

from __future__ import annotations

import json
import math
import sys


def main(folder: str, mesh: str) -> None:
    """One JSON line."""
    import jax

    jax.config.update("jax_num_cpu_devices", math.prod(int(part.split("=")[1]) for part in mesh.split(",")))
    import jax.numpy as jnp

    from models.layers import Build
    from models.loading import opening
    from models.loading.load import fill
    from models.loading.source import resolve
    from models.parameters import parameters_of
    from sharding.mesh import make_mesh
    from tests.models.bridge.sweep import traced
    from tests.models.paged import PagedModel

    told = json.load(sys.stdin)
    opened = traced(opening.open_checkpoint, resolve(folder), told["architecture"])
    devices = make_mesh(mesh)
    build = Build(jnp.float32, jnp.float32, devices, max_model_len=64)
    model = opened.family.build(opened.family.config(opened.hf_config), build)
    fill(model, opened.checkpoint, build, progress=False)
    cut = [path for path, weight in parameters_of(model) if not weight.get_value().sharding.is_fully_replicated]
    results = PagedModel(model, max_len=64, mesh=devices).generate(told["prompts"], told["new"])
    print(json.dumps({"tokens": [tokens for tokens, _ in results], "cut": len(cut)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
