"""Run as `python -m tests.serving.adapters.mesh_run FOLDER`: adapters on meshes of two CPU devices.

FOLDER has "base", and "a", "b", "c", "d" and "e" beside it. A batch of 32 requests mixes four of them with the base, while the
fifth comes, is asked, and goes, for which there is no room beside them. Prints a JSON object: mesh -> {"tokens": of each request,
"fifth": of the fifth's, "loaded": how often an adapter went to the devices}.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import sys

import jax

if __name__ == "__main__":  # the test imports what is asked, and its process is to stay as it is
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time

from serving.boot.startup import start
from serving.engine.api.config import EngineConfig
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.requests import buckets
from serving.service import GenerateInput, collect

MESHES = ("model=2", "data=2")  # one device: test_llm_adapters.py
NAMES = ("a", "b", "c", "d")
STEPS = 16


def prompt(index: int) -> list[int]:
    """More than a page is shared by all, so that pages of one adapter could be taken for another's."""
    return [*[(7 * i) % 250 + 2 for i in range(19)], index + 2, 2 * index + 3]


def asked() -> list[str | None]:
    """Whom each of the 32 asks."""
    return ([None, *NAMES] * 7)[:32]


async def answers(started, folder: pathlib.Path) -> tuple[list[list[int]], list[list[int]]]:
    service = started.service()
    adapters = service.adapters
    for name in NAMES:
        adapters.load(name, str(folder / name))
    params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)

    async def one(model: str | None, index: int) -> list[int]:
        prepared = await service.prepare(GenerateInput(token_ids=prompt(index), model=model), params)
        return list((await collect(prepared, service.generate(prepared))).outputs[0].token_ids)

    async def fifth() -> list[list[int]]:
        found = []
        for _ in range(2):
            await asyncio.to_thread(adapters.load, "e", str(folder / "e"))
            found += await asyncio.gather(*(one("e", index) for index in range(2)))
            await asyncio.to_thread(adapters.unload, "e")
        return found

    try:
        work = [one(model, index) for index, model in enumerate(asked())]
        tokens, more = await asyncio.gather(asyncio.gather(*work), fifth())
        return list(tokens), more
    finally:
        for name in NAMES:
            await asyncio.to_thread(adapters.unload, name)


def run(folder: pathlib.Path, mesh: str) -> dict:
    started = start(
        EngineConfig(
            model=str(folder / "base"), mesh=mesh, dtype="float32", max_model_len=64, max_num_seqs=32, page_size=8,
            max_num_batched_tokens=64, kv_cache_memory="8MiB", progress=False, enable_lora=True, max_loras=4,
            max_lora_rank=8,
        )
    )  # fmt: skip
    try:
        tokens, fifth = asyncio.run(answers(started, folder))
        again, _ = asyncio.run(answers(started, folder))  # with every prefix cached
        started.engine.runner.guard.check()
        assert again == tokens, "cached pages gave something else"
        return {"tokens": tokens, "fifth": fifth, "loaded": started.engine.scheduler.adapters.num_loaded}
    finally:
        started.shutdown()


def main(folder: pathlib.Path) -> None:
    buckets._doubling = lambda low, high: [high]  # one width of decode steps: compiling is most of the time
    print(json.dumps({mesh: run(folder, mesh) for mesh in MESHES}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
