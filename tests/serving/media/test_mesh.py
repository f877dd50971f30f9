"""Images on meshes: transformers' tokens, with the tower cut over `model`, and with a store of embeddings
for each replica of `data`.

What is cut, a tower's heads and blocks, families share; so each time one of them runs, on a mesh that does both, and all where slow
tests do.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.models import tiny_vision
from tests.models.tiny_vision import TINY
from tests.serving.media.mesh_run import TURNS

ALWAYS, BOTH = "Qwen2.5-VL", "data=2,model=2"


def on_meshes(name, folder, *meshes):
    """Holds what each mesh answers to transformers; one process, because the number of CPU devices is fixed at its start."""
    model = tiny_vision.save(name, folder / name)
    command = [sys.executable, "-m", "tests.serving.media.mesh_run", str(folder), *meshes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])[name]
    wanted = [tiny_vision.expected(name, model, *one[1:]) for one in TURNS]
    for mesh in meshes:
        assert found[mesh]["prompts"] == [prompt for prompt, _ in wanted]
        assert found[mesh]["tokens"] == [tokens for _, tokens in wanted], mesh
        assert len(found[mesh]["encoded"]) == (2 if "data" in mesh else 1)
        assert min(found[mesh]["encoded"]) > 0, "every replica has encoded images"


def test_images_on_a_mesh(tmp_path):
    on_meshes(ALWAYS, tmp_path, BOTH)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TINY))
def test_every_family_on_two_devices(name, tmp_path):
    on_meshes(name, tmp_path, "model=2", "data=2")
