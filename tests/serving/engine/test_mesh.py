"""The engine on meshes of CPU devices: the same tokens, and no collective but those that the mesh calls for."""

import json
import subprocess
import sys

import pytest

LAYERS = 2
CASES = [
    ("dense", "model=2"),
    ("dense", "model=4"),
    ("dense", "data=2,model=2"),
    ("dense", "data=4"),
    ("moe", "expert=2,model=2"),
    ("windows", "data=2,model=2"),
    ("hybrid", "data=2,model=2"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every mesh answered; one process, because the number of CPU devices is fixed at its start."""
    command = [sys.executable, "-m", "tests.serving.engine.mesh_run", str(tmp_path_factory.mktemp("mesh"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def forwards(result):
    return {name: counts for name, counts in result["collectives"].items() if name.startswith("forward")}


@pytest.mark.parametrize(("model", "mesh"), CASES)
def test_same_tokens_as_on_one_device(results, model, mesh):
    alone = results[model]["model=1"]["tokens"]
    assert all(len(tokens) == 24 for tokens in alone) and len({tuple(tokens) for tokens in alone}) > 8
    assert results[model][mesh]["tokens"] == alone


def test_drafts_are_verified_in_every_replica_of_a_cut_model(results):
    accepted, verified = results["dense"]["data=2,model=2"]["drafts"]
    assert 0 < accepted < verified
    assert results["dense"]["model=2"]["drafts"] == [0, 0]


@pytest.mark.parametrize(("model", "mesh"), CASES)
def test_same_logprobs_and_embeddings_as_on_one_device(results, model, mesh):
    for expected, found in zip(results[model]["model=1"]["numbers"], results[model][mesh]["numbers"], strict=True):
        assert len(expected) > 3
        assert found == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("mesh", ["model=2", "model=4", "data=2,model=2"])
def test_two_all_reduces_a_layer_and_one_for_the_embedding(results, mesh):
    assert all(counts == {} for counts in forwards(results["dense"]["model=1"]).values())
    for program, counts in forwards(results["dense"][mesh]).items():
        assert counts == {"all-reduce over model": 2 * LAYERS + 1}, program


def test_experts_add_what_they_have(results):
    for program, counts in forwards(results["moe"]["expert=2,model=2"]).items():
        assert counts == {"all-reduce over model": LAYERS + 1, "all-reduce over expert+model": LAYERS}, program


@pytest.mark.parametrize(("model", "mesh"), CASES)
def test_sampling_exchanges_logits_and_results_and_nothing_else(results, model, mesh):
    """And so nothing in its branches, which replicas take as their requests want: that would wait for ever."""
    wanted = {} if mesh == "data=4" else {"all-to-all over model": 1, "all-gather over model": 1}
    samples = {k: v for k, v in results[model][mesh]["collectives"].items() if k.startswith("sample")}
    assert samples
    for program, counts in samples.items():
        assert {kind: n for kind, n in counts.items() if "data" not in kind} == wanted, program
        assert sum(n for kind, n in counts.items() if "data" in kind) == (5 if "data" in mesh else 0), program


@pytest.mark.parametrize(("model", "mesh"), [case for case in CASES if "data" in case[1]])
def test_replicas_only_meet_where_the_host_reads(results, model, mesh):
    result = results[model][mesh]
    for program, counts in forwards(result).items():
        assert not any("data" in kind for kind in counts), (program, counts)
    for program, counts in result["collectives"].items():
        crossing = {kind for kind in counts if "data" in kind}
        assert crossing <= {"all-gather over data"} and (crossing or program.startswith("forward")), (program, counts)
    if mesh == "data=4":
        assert all(counts == {} for counts in forwards(result).values())


def test_evicted_pages_come_back_to_the_replica_they_were_in(results):
    """The second run's tokens are the first one's, or the process would have failed."""
    assert results["windows"]["data=2,model=2"]["restored"] > 4


@pytest.mark.parametrize(("model", "mesh"), CASES)
def test_requests_go_where_their_prefix_is_and_where_there_is_room(results, model, mesh):
    result = results[model][mesh]
    assert sum(result["placed"]) == 18, "nobody was preempted"
    assert all(count > 0 for count in result["placed"]), "an idle replica takes the next request"
    assert result["hits"] >= 16, "the prefix of the first request is found at least once"
