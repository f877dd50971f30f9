"""Run as `python -m tests.serving.media.audio_mesh_run FOLDER MESH...`: chats with sounds on meshes of two CPU devices.

FOLDER has a checkpoint for each family that is tried. Prints a JSON object: family -> mesh -> {"prompts": token ids of each chat,
"tokens": of each answer, "encoded": windows that each replica encoded}.
"""

from __future__ import annotations

import json
import pathlib
import sys

import jax

if __name__ == "__main__":  # the test imports what is asked, and its process is to stay as it is
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time

from serving.engine.requests import buckets
from serving.llm import LLM
from tests.models.tiny_audio import TINY
from tests.models.tiny_whisper import sound
from tests.serving.media.test_audio_chats import GREEDY, LONG, SHORT, turn

TURNS = (
    turn(10, SHORT, 11),
    turn(LONG, 20, 21, SHORT, 22),
    turn(30, 31),
    turn(40, sound(4.01, 4), 41),
)
"""Cut inside sounds, several sounds, one sound of several chats, none, and one longer than a window."""


def run(folder: pathlib.Path, mesh: str) -> dict:
    llm = LLM(
        str(folder), mesh=mesh, dtype="float32", quantization="none", max_num_seqs=4, mm_encoder_cache_gb=0.0, progress=False,
        max_model_len=224, max_num_batched_tokens=64 if "data" in mesh else 32, kv_cache_memory="4MiB",
    )  # fmt: skip
    try:
        outputs = llm.chat([one[0] for one in TURNS], GREEDY, use_tqdm=False)
        engine = llm._started.engine
        engine.runner.guard.check()
        return {
            "prompts": [list(output.prompt_token_ids) for output in outputs],
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "encoded": [manager.media.misses for manager in engine.scheduler.kv.managers],
        }
    finally:
        llm.shutdown()


def main(folder: pathlib.Path, *meshes: str) -> None:
    buckets._doubling = lambda low, high: [high]  # one width of decode steps: compiling is most of the time
    names = [name for name in TINY if (folder / name).exists()]
    print(json.dumps({name: {mesh: run(folder / name, mesh) for mesh in meshes} for name in names}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), *sys.argv[2:])
