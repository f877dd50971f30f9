"""Run as `python -m tests.serving.engine.drafts_mesh_run FOLDER`: drafts of heads, and beside layers that keep a state, on meshes
of two CPU devices. Prints a JSON object: case -> the tokens of each request, and how many drafts were verified."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time

from serving.engine.api.sampling_params import SamplingParams  # noqa: E402
from serving.llm import LLM  # noqa: E402
from tests.tiny_heads import write_mtp  # noqa: E402

SETTINGS: dict[str, Any] = {
    "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 96, "kv_cache_memory": "4MiB", "page_size": 16,
    "dtype": "float32", "progress": False, "compile_cache": "",
}  # fmt: skip
HOW = {"num_speculative_tokens": 2, "enable_adaptive_verification": False}
LOOKUPS = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}
CASES = {
    "glm-4.5": [("data=1,model=1", None), ("data=1,model=2", {"method": "mtp"}), ("data=2,model=1", {"method": "mtp"})],
    "qwen3.5": [("data=1,model=1", None), ("data=1,model=2", {"method": "mtp"}), ("data=2,model=1", LOOKUPS)],
}


def main(folder: pathlib.Path) -> None:
    found = {}
    for name, cases in CASES.items():
        path = folder / name
        write_mtp(path, name)
        for mesh, how in cases:
            drafts = {} if how is None else {"speculative_config": HOW | how}
            with LLM(str(path), mesh=mesh, **SETTINGS, **drafts) as llm:
                prompts = [{"prompt_token_ids": [7 + i, *[20, 21, 22, 23] * (2 + i)]} for i in range(5)]  # for lookups
                params = [
                    SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=20, ignore_eos=True) for i in range(5)
                ]
                outputs = llm.generate(prompts, params, use_tqdm=False)
                found[f"{name}, {mesh}"] = {
                    "tokens": [list(out.outputs[0].token_ids) for out in outputs],
                    "drafts": llm.stats().num_draft_tokens,
                }
    print(json.dumps(found))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
