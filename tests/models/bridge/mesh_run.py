"""A traced model on a mesh of CPU devices: `python -m tests.models.bridge.mesh_run FOLDER MESH`, with prompts on standard input;
prints their greedy completions. What `test_engine.py` runs in a process of its own. Where the mesh has replicas, an engine runs
them all at once, twice; else they run over pages by hand."""

from __future__ import annotations

import asyncio
import collections
import json
import math
import sys
from typing import Any


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
    if "data" in mesh:
        found = served(model, devices, mesh, told["prompts"], told["new"])
    else:
        results = PagedModel(model, max_len=64, mesh=devices).generate(told["prompts"], told["new"])
        found = {"tokens": [tokens for tokens, _ in results]}
    print(json.dumps(found | {"cut": len(cut)}))


def served(model: Any, devices: Any, mesh: str, prompts: list[list[int]], new: int) -> dict[str, Any]:
    """Greedy completions by an engine with replicas; "placed": how many of the requests each of them had."""
    from serving.engine.api.sampling_params import SamplingParams
    from serving.engine.api.types import EngineRequest
    from tests.serving.engine.mesh_run import engine_around

    engine = engine_around(model, devices, mesh)
    placed: collections.Counter[int] = collections.Counter()
    schedule = engine.scheduler.schedule

    def noting(*args: Any) -> Any:
        plan = schedule(*args)
        placed.update(request.replica for request in (() if plan is None else plan.admitted))
        return plan

    engine.scheduler.schedule = noting
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)

    async def answer(name: str, prompt: list[int]) -> list[int]:
        request = EngineRequest(name, tuple(prompt), params)
        return [*prompt, *[token async for output in engine.client.generate(request) for token in output.token_ids]]

    async def twice() -> list[list[list[int]]]:
        return [await asyncio.gather(*(answer(f"{n} {i}", p) for i, p in enumerate(prompts))) for n in range(2)]

    first, again = asyncio.run(twice())
    hits = engine.scheduler.counters.prefix_hits
    engine.shutdown()
    engine.runner.guard.check()
    assert first == again
    return {"tokens": first, "placed": [placed[i] for i in range(engine.runner.executor.replicas)], "hits": hits}


if __name__ == "__main__":
    main(*sys.argv[1:])
