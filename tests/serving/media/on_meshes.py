"""What chats with images or sounds get on a mesh: the part of `mesh_run` and `audio_mesh_run` that is the same."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.requests import buckets
from serving.llm import LLM


def answers(folder: pathlib.Path, mesh: str, chats: list[Any], params: SamplingParams, **sizes: Any) -> dict[str, Any]:
    """Of a checkpoint on a mesh, in float32: "prompts" and "tokens" of each chat, and what each replica "encoded"; nothing is
    compiled late."""
    llm = LLM(
        str(folder), mesh=mesh, dtype="float32", quantization="none", max_num_seqs=4, mm_encoder_cache_gb=0.0, progress=False,
        kv_cache_memory="4MiB", **sizes,
    )  # fmt: skip
    try:
        outputs = llm.chat(chats, params, use_tqdm=False)
        engine = llm._started.engine
        engine.runner.guard.check()
        return {
            "prompts": [list(output.prompt_token_ids) for output in outputs],
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "encoded": [manager.media.misses for manager in engine.scheduler.kv.managers],
        }
    finally:
        llm.shutdown()


def print_all(
    folder: pathlib.Path, names: Iterable[str], meshes: Iterable[str], run: Callable[[str, str], dict[str, Any]]
) -> None:
    """A JSON object: family -> mesh -> what `run` finds, of the families that the folder has a checkpoint of."""
    buckets._doubling = lambda low, high: [high]  # one width of decode steps: compiling is most of the time
    there = [name for name in names if (folder / name).exists()]
    print(json.dumps({name: {mesh: run(name, mesh) for mesh in meshes} for name in there}))
