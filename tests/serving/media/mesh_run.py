"""Run as `python -m tests.serving.media.mesh_run FOLDER MESH...`: chats with images on meshes of four CPU devices.

FOLDER has a checkpoint for each family that is tried. Prints a JSON object: family -> mesh -> {"prompts": token ids of each chat,
"tokens": of each answer, "encoded": images that each replica encoded}.
"""

from __future__ import annotations

import functools
import pathlib
import sys

import jax

if __name__ == "__main__":  # the test imports what is asked, and its process is to stay as it is
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time

from tests.models.tiny_vision import TINY
from tests.serving.media.on_meshes import answers, print_all
from tests.serving.media.test_images import GREEDY, LARGE, SMALL, turn

TURNS = (
    turn(10, SMALL, 11),
    turn(LARGE, 20, 21, SMALL, 22),
    turn(30, 31),
    turn(40, LARGE, 41, 42),
)
"""Cut inside images, several images, one image of several chats, and none."""


def run(folder: pathlib.Path, name: str, mesh: str) -> dict:
    sizes: dict = {"max_model_len": 160, "max_num_batched_tokens": 32} | TINY[name].engine
    sizes.pop("kv_cache_memory", None)
    sizes["max_num_batched_tokens"] *= 2 if "data" in mesh else 1  # of all replicas
    return answers(folder / name, mesh, [one[0] for one in TURNS], GREEDY, **sizes)


def main(folder: pathlib.Path, *meshes: str) -> None:
    print_all(folder, TINY, meshes, functools.partial(run, folder))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), *sys.argv[2:])
