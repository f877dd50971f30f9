"""The engine on meshes of CPU devices: the same tokens, and no collective but those that tensor parallelism needs."""

import json
import subprocess
import sys

import pytest

LAYERS = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every mesh answered; one process, because the number of CPU devices is fixed at its start."""
    command = [sys.executable, "-m", "tests.serving.engine.mesh_run", str(tmp_path_factory.mktemp("mesh"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", ["model=4", "data=2,model=2"])
def test_same_tokens_as_on_one_device(results, mesh):
    assert all(len(tokens) == 24 for tokens in results["model=1"]["tokens"])
    assert results[mesh]["tokens"] == results["model=1"]["tokens"]


@pytest.mark.parametrize("mesh", ["model=4", "data=2,model=2"])
def test_two_all_reduces_a_layer_and_one_for_the_embedding(results, mesh):
    assert all(counts == {} for counts in results["model=1"]["collectives"].values())
    for program, counts in results[mesh]["collectives"].items():
        assert counts == {"all-reduce": 2 * LAYERS + 1}, program
