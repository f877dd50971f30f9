"""Run as `python -m tests.serving.engine.mesh_run FOLDER`: the same requests on several meshes of four CPU devices.

Prints a JSON object: mesh -> {"tokens": of each request, "collectives": of each program, by kind}.
"""

from __future__ import annotations

import asyncio
import collections
import json
import pathlib
import re
import sys
from types import SimpleNamespace

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

from models.config import ModelConfig, RopeConfig  # noqa: E402
from models.dummy import random_model  # noqa: E402
from models.layers import Build  # noqa: E402
from models.loading import orbax  # noqa: E402
from models.loading.load import parameters_of  # noqa: E402
from serving.engine.compiling import ProgramCache  # noqa: E402
from serving.engine.config import EngineConfig  # noqa: E402
from serving.engine.engine import Engine  # noqa: E402
from serving.engine.executor import Executor  # noqa: E402
from serving.engine.runner import ModelRunner  # noqa: E402
from serving.engine.sampling_params import SamplingParams  # noqa: E402
from serving.engine.scheduler import Scheduler, SchedulerConfig  # noqa: E402
from serving.engine.sizing import Sizes  # noqa: E402
from serving.engine.types import EngineInfo, EngineRequest  # noqa: E402
from sharding.mesh import make_mesh  # noqa: E402

MESHES = ("model=1", "model=4", "data=2,model=2")
LAYERS = 2
CONFIG = ModelConfig(
    "LlamaForCausalLM", 256, LAYERS, 48, 96, 9, 3, 16, 256, 1e-5, rope=RopeConfig(10000.0, 16)
)  # 9 and 3 heads: neither mesh divides them
SIZES = Sizes(2, 32, 128, 60, 8, 0, "float32")
COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")


def model_on(folder: pathlib.Path, mesh: jax.sharding.Mesh | None):
    """The saved model on a mesh, loaded as a server loads it."""
    build = Build(mesh=mesh, max_model_len=256)
    model = random_model(CONFIG, build, seed=7)  # for its structure; every parameter is replaced
    parameters = dict(parameters_of(model))
    for path, value in orbax.restore(folder, parameters, build).items():
        parameters[path].set_value(value)
    return model


def make_engine(folder: pathlib.Path, text: str) -> Engine:
    mesh = make_mesh(text)
    executor = Executor(model_on(folder, mesh), SIZES, ProgramCache(None, ""), mesh=mesh if mesh.size > 1 else None)
    executor.compile()
    runner = ModelRunner(executor)
    rows, tokens = runner.buckets.max_rows, runner.buckets.max_chunk
    scheduler = Scheduler(SchedulerConfig(2, 32, tokens, rows, 128, 8, 60))
    info = EngineInfo(
        "tiny", "LlamaForCausalLM", 256, 128, 2, 32, 8, 60, "float32", None, text, "cpu", "test"
    )  # fmt: skip
    config = EngineConfig(page_size=8, progress=False)
    engine = Engine(config, SimpleNamespace(source=None, generation_config={}), runner, scheduler, info)
    engine.loop.start()
    return engine


async def answers(engine: Engine) -> list[list[int]]:
    """Greedy answers to more requests than run at once; the first three share two pages of their prompts."""
    shared = [(7 * i) % 250 for i in range(19)]
    prompts = [[*shared, i, i + 1] for i in range(3)] + [[11, 5, 200 + i] * (1 + 9 * i) for i in range(3)]

    async def one(index: int, prompt: list[int]) -> list[int]:
        request = EngineRequest(
            f"r{index}", tuple(prompt), SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        )
        return [token async for output in engine.client.generate(request) for token in output.token_ids]

    first = await one(0, prompts[0])  # alone, so that its pages are there to share
    return [first, *await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts[1:], 1)))]


def collectives(engine: Engine) -> dict[str, dict[str, int]]:
    """How many of each kind the forward programs hold."""
    found = {}
    for name, program in engine.runner.executor.programs.items():
        if name.startswith("forward"):
            found[name] = dict(collections.Counter(COLLECTIVE.findall(program.as_text())))
    return found


def main(folder: pathlib.Path) -> None:
    plain = random_model(CONFIG, Build(max_model_len=256), seed=3)
    orbax.save(folder / "model", dict(parameters_of(plain)), hf_config={}, generation_config={}, model_id="tiny")
    results = {}
    for mesh in MESHES:
        engine = make_engine(folder / "model", mesh)
        results[mesh] = {"tokens": asyncio.run(answers(engine)), "collectives": collectives(engine)}
        engine.shutdown()
        engine.runner.guard.check()
    print(json.dumps(results))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
