"""Run as `python -m tests.serving.engine.mesh_run FOLDER`: the same requests on several meshes of four CPU devices.

Prints a JSON object: model -> mesh -> {"tokens": of each request, "numbers": of some, "collectives": of each program, by
kind and by the axes they cross, "hits": prompt tokens found in a cache, "placed": how many requests each replica ran,
"restored": where evicted pages go to host memory, how many came back from there}.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import math
import pathlib
import re
import sys
from types import SimpleNamespace
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time; what is counted is the same

import numpy as np  # noqa: E402

from models.config import ModelConfig, MoEConfig, RopeConfig  # noqa: E402
from models.dummy import random_model  # noqa: E402
from models.embedding_head import EmbeddingHead  # noqa: E402
from models.families.gemma.gemma4 import Gemma4  # noqa: E402
from models.layers import Build  # noqa: E402
from models.loading import orbax  # noqa: E402
from models.mixers import DeltaNet  # noqa: E402
from models.parameters import parameters_of  # noqa: E402
from ops.paged_attention.groups import layers_per_page  # noqa: E402
from serving.engine.api.config import EngineConfig  # noqa: E402
from serving.engine.api.sampling_params import SamplingParams  # noqa: E402
from serving.engine.api.speculative import SpeculativeConfig  # noqa: E402
from serving.engine.api.types import EngineInfo, EngineRequest  # noqa: E402
from serving.engine.device.executor import Executor  # noqa: E402
from serving.engine.device.programs.compiling import ProgramCache  # noqa: E402
from serving.engine.device.runner import StepRunner  # noqa: E402
from serving.engine.device.sizing import Sizes  # noqa: E402
from serving.engine.engine import Engine  # noqa: E402
from serving.engine.requests.cache_specs import RecurrentSpec, paged  # noqa: E402
from serving.engine.scheduling.scheduler import Scheduler, SchedulerConfig  # noqa: E402
from sharding.mesh import make_mesh  # noqa: E402

LAYERS = 2
ROPE = RopeConfig(10000.0, 16)
MODELS = {
    # 9 and 3 heads: no mesh divides them
    "dense": ModelConfig("LlamaForCausalLM", 256, LAYERS, 48, 96, 9, 3, 16, 256, 1e-5, rope=ROPE),
    "moe": ModelConfig(
        "MixtralForCausalLM",
        256,
        LAYERS,
        48,
        64,
        4,
        2,
        16,
        256,
        1e-5,
        rope=ROPE,
        moe=MoEConfig(4, 2, 64, (True,) * LAYERS, normalize=True),
    ),
    # A layer with a window, and in pages of as many bytes two that see all and have half as many heads.
    "windows": ModelConfig(
        "Gemma4ForCausalLM",
        256,
        3,
        48,
        96,
        4,
        4,
        16,
        256,
        1e-5,
        rope=ROPE,
        qk_norm="head",
        windows=(12, None, None),
        extra=(("gemma4", Gemma4(((4, 16), (2, 16), (2, 16)), (None,) * 3, (96,) * 3, False, None)),),
    ),
    "hybrid": ModelConfig(
        "Qwen3_5ForCausalLM",
        256,
        LAYERS,
        48,
        96,
        4,
        2,
        16,
        256,
        1e-5,
        rope=RopeConfig(1e4, 4),
        qk_norm="head",
        attn_gate=True,
        mixers=(DeltaNet(2, 8, 4, 8), None),
    ),
}
MESHES = {
    "dense": ("model=1", "model=2", "model=4", "data=2,model=2", "data=4"),
    "moe": ("model=1", "expert=2,model=2"),
    "windows": ("model=1", "data=2,model=2"),
    "hybrid": ("model=1", "data=2,model=2"),
}
HOST_TIER = ("windows", "data=2,model=2")
"""Model and mesh (its KV heads are cut) whose pages are too few, with a host tier behind them."""
DRAFTS = ("dense", "data=2,model=2")
"""Model and mesh whose steps verify drafts, right ones and wrong ones."""
SIZES = Sizes(2, 32, 128, 60, 8, 0, "float32")  # of each replica
COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(.*?"
    r"(?:replica_groups|source_target_pairs)=(?:(?P<listed>\{\{[\d,{}]*\}\})"
    r"|\[(?P<shape>[\d,]+)\]<=\[(?P<iota>[\d,]+)\](?:T\((?P<turn>[\d,]+)\))?"
    r"|mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\(\[(?P<ids>[\d,]+)\](?:T\((?P<turned>[\d,]+)\))?\))? \{(?P<used>[^}]*)\})"
)


def model_on(folder: pathlib.Path, config: ModelConfig, mesh: jax.sharding.Mesh | None):
    """The saved model on a mesh, loaded as a server loads it."""
    build = Build(mesh=mesh, max_model_len=256)
    model = random_model(config, build, seed=7)  # for its structure; every parameter is replaced
    parameters = dict(parameters_of(model))
    for path, value in orbax.restore(folder, parameters, build).items():
        parameters[path].set_value(value)
    return model


def make_engine(
    folder: pathlib.Path, config: ModelConfig, text: str, host_tier: bool = False, drafts: bool = False
) -> Engine:
    mesh = make_mesh(text)
    return engine_around(model_on(folder, config, mesh), mesh, text, host_tier, drafts)


def engine_around(
    model: Any, mesh: jax.sharding.Mesh, text: str, host_tier: bool = False, drafts: bool = False
) -> Engine:
    """A started engine of a model whose weights lie on a mesh, which `text` says."""
    sizes = dataclasses.replace(SIZES, layers_per_page=layers_per_page(model.kv_specs(), SIZES.max_model_len))
    if model.state_specs():
        sizes = dataclasses.replace(sizes, num_snapshots=6)
    how = None
    if drafts:
        sizes = dataclasses.replace(sizes, draft_tokens=3, draft_places=32)
        how = SpeculativeConfig(
            "ngram", None, 3, prompt_lookup_min=1, prompt_lookup_max=4, enable_adaptive_verification=False
        )
    executor = Executor(model, sizes, ProgramCache(None, ""), mesh=mesh if mesh.size > 1 else None, host_tier=host_tier)
    executor.compile()
    runner = StepRunner(executor)
    rows, tokens = runner.buckets.max_rows, runner.buckets.max_chunk
    scheduler = Scheduler(
        SchedulerConfig(
            2,
            32,
            tokens,
            rows,
            128,
            8,
            36 if host_tier else 60,
            replicas=executor.replicas,
            caches=(*paged(*executor.groups.windows), *_states(executor)),
            num_snapshots=sizes.num_snapshots,
            host_pages=400 if host_tier else 0,
            speculative_config=how,
            buckets=runner.buckets if drafts else None,
        )
    )
    info = EngineInfo(
        "tiny", "LlamaForCausalLM", 256, 128, 2, 32, 8, 60, "float32", None, text, "cpu", "test"
    )  # fmt: skip
    engine = Engine(
        EngineConfig(page_size=8, progress=False),
        SimpleNamespace(source=None, generation_config={}, embedding=EmbeddingHead(("last",))),
        runner,
        scheduler,
        info,
    )
    engine.loop.start()
    return engine


def _states(executor: Executor) -> tuple[RecurrentSpec, ...]:
    """What recurrent layers keep, with snapshots close enough for short prompts."""
    if executor.recurrent is None:
        return ()
    return (dataclasses.replace(executor.recurrent, interval=16, tail=8, worth=8),)


def asked() -> list[list[int]]:
    """Prompts; the first four share two pages."""
    shared = [(7 * i) % 250 for i in range(19)]
    return [[*shared, i, i + 1] for i in range(4)] + [[11, 5, 200 + i] * (1 + 9 * (i % 3)) for i in range(8)]


async def wholes(engine: Engine) -> list[list[int]]:
    """The answers to the last three, which nobody looks at before they end: several decode steps a dispatch."""
    engine.scheduler.lengths.observe = lambda plan, seconds: setattr(engine.scheduler.lengths, "step_s", 0.01)

    async def one(index: int, prompt: list[int]) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        request = EngineRequest(f"w{index}", tuple(prompt), params, whole=True)
        return [token async for output in engine.client.generate(request) for token in output.token_ids]

    return await asyncio.gather(*(one(i, p) for i, p in enumerate(asked()[-3:])))


async def answers(engine: Engine) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy answers to more requests than run at once; the first four share two pages of their prompts. And numbers that
    were asked for beside them: log probabilities of prompts and completions, and embeddings."""
    prompts = asked()

    async def one(index: int, prompt: list[int]) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        if index == 5:  # what the host masks is masked in its own row
            params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, allowed_token_ids=(3, 5, 8))
        if index == 6:  # and what a slot keeps on the device is that slot's
            params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, repetition_penalty=1.7)
        request = EngineRequest(f"r{index}", tuple(prompt), params)
        return [token async for output in engine.client.generate(request) for token in output.token_ids]

    async def numbers_of(index: int, prompt: list[int]) -> list[float]:
        if index % 2:
            return (await engine.client.embed(f"e{index}", tuple(prompt), pooling="mean")).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=2, prompt_logprobs=1)
        request = EngineRequest(f"n{index}", tuple(prompt), params)
        found = []
        async for output in engine.client.generate(request):
            found += [entry for entry in (*(output.prompt_logprobs or ()), *(output.logprobs or ())) if entry]
        return [entry.logprob for entry in found]

    first = await one(0, prompts[0])  # alone, so that its pages are there to share
    tokens = asyncio.gather(*(one(i, p) for i, p in enumerate(prompts[1:], 1)))
    beside = asyncio.gather(*(numbers_of(i, p) for i, p in enumerate(prompts[2:8])))
    return [first, *await tokens], await beside


def numbers(text: str | None) -> list[int]:
    return [int(i) for i in text.split(",")] if text else []


def groups_of(found: re.Match[str], size: int) -> list[list[int]]:
    """Which devices a collective joins, from any of XLA's three ways to write it."""
    if found["listed"]:
        return [numbers(group) for group in found["listed"][2:-2].split("},{")]
    if found["shape"]:
        ids = np.arange(size).reshape(numbers(found["iota"])).transpose(numbers(found["turn"]) or None)
        return ids.reshape(numbers(found["shape"])).tolist()
    axes = dict(re.findall(r"'(\w+)'=(\d+)", found["axes"]))
    ids = np.arange(size).reshape(numbers(found["ids"]) or size).transpose(numbers(found["turned"]) or None)
    ids = ids.reshape([int(extent) for extent in axes.values()])
    used = [list(axes).index(name) for name in re.findall(r"'(\w+)'", found["used"])]
    others = [axis for axis in range(ids.ndim) if axis not in used]
    return ids.transpose(others + used).reshape(-1, math.prod(ids.shape[axis] for axis in used)).tolist()


def axes_of(found: re.Match[str], mesh: jax.sharding.Mesh) -> str:
    """The mesh axes that a collective crosses: "model", "data+model", ..."""
    crossed = set()
    for group in groups_of(found, mesh.size):
        places = np.unravel_index(group, mesh.devices.shape)
        crossed |= {name for name, along in zip(mesh.axis_names, places, strict=True) if len(set(along)) > 1}
    return "+".join(sorted(crossed))


def collectives(engine: Engine, mesh: jax.sharding.Mesh) -> dict[str, dict[str, int]]:
    """How many collectives of each kind and each set of axes the programs hold."""
    found = {}
    for key, program in engine.runner.executor.programs.items():
        name = str(key)
        if key.kind in ("forward", "sample"):
            counts = collections.Counter()
            for match in COLLECTIVE.finditer(program.as_text()):
                counts[f"{match[1]} over {axes_of(match, mesh)}"] += 1
            found[name] = dict(counts)
    return found


def run(folder: pathlib.Path, config: ModelConfig, text: str, host_tier: bool, drafts: bool) -> dict:
    engine = make_engine(folder, config, text, host_tier, drafts)
    placed = collections.Counter()
    schedule = engine.scheduler.schedule

    def noting(*args):
        plan = schedule(*args)
        for request in plan.admitted if plan is not None else ():
            placed[request.replica] += 1
        return plan

    engine.scheduler.schedule = noting
    tokens, beside = asyncio.run(answers(engine))
    hits, ran = engine.scheduler.counters.prefix_hits, [placed[i] for i in range(engine.runner.executor.replicas)]
    restored = 0
    if host_tier:
        again, _ = asyncio.run(answers(engine))
        assert again == tokens, "what comes back from the host is something else"
        restored = sum(manager.host_tier.num_restored for manager in engine.scheduler.kv.managers)
    assert asyncio.run(wholes(engine)) == tokens[-3:], "several steps a dispatch say something else"
    assert drafts or max(step.num_steps for step in engine.recent) > 1, "no dispatch had several steps"
    engine.shutdown()
    engine.runner.guard.check()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages - 1, "pages leaked"
    return {
        "tokens": tokens,
        "numbers": beside,
        "collectives": collectives(engine, make_mesh(text)),
        "hits": hits,
        "placed": ran,
        "restored": restored,
        "drafts": [engine.scheduler.counters.accepted_tokens, engine.scheduler.counters.draft_tokens],
    }


def main(folder: pathlib.Path) -> None:
    results = {}
    for name, config in MODELS.items():
        plain = random_model(config, Build(max_model_len=256), seed=3)
        orbax.save(folder / name, dict(parameters_of(plain)), hf_config={}, generation_config={}, model_id="tiny")
        results[name] = {
            text: run(folder / name, config, text, (name, text) == HOST_TIER, (name, text) == DRAFTS)
            for text in MESHES[name]
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
