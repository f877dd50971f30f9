"""Run as `python -m tests.serving.media.audio_mesh_run FOLDER MESH...`: chats with sounds on meshes of two CPU devices.

FOLDER has a checkpoint for each family that is tried. Prints a JSON object: family -> mesh -> {"prompts": token ids of each chat,
"tokens": of each answer, "encoded": windows that each replica encoded}.
"""

from __future__ import annotations

import pathlib
import sys

import jax

if __name__ == "__main__":  # the test imports what is asked, and its process is to stay as it is
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time

from tests.models.hearing import MADE_BY
from tests.models.tiny_whisper import sound
from tests.serving.media.on_meshes import answers, print_all
from tests.serving.media.test_audio_chats import GREEDY, LONG, SHORT, turn

TURNS = (
    turn(10, SHORT, 11),
    turn(LONG, 20, 21, SHORT, 22),
    turn(30, 31),
    turn(40, sound(4.01, 4), 41),
)
"""Cut inside sounds, several sounds, one sound of several chats, none, and one longer than a window."""


def main(folder: pathlib.Path, *meshes: str) -> None:
    def run(name: str, mesh: str) -> dict:
        most = 64 if "data" in mesh else 32
        return answers(
            folder / name, mesh, [one[0] for one in TURNS], GREEDY, max_model_len=224, max_num_batched_tokens=most
        )

    print_all(folder, MADE_BY, meshes, run)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), *sys.argv[2:])
