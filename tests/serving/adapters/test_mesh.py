"""Adapters on meshes and in several processes: the tokens of transformers with peft, in one batch with the base."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from proto.jaxserve.v1 import inference_pb2 as pb
from proto.jaxserve.v1.sampling_pb2 import SamplingParams
from tests.models.adapters.make import SIZES, write_adapter, write_base
from tests.serving.adapters.mesh_run import MESHES, NAMES, STEPS, asked, prompt
from tests.serving.adapters.oracle import greedy
from tests.serving.processes.test_two_processes import pair, stub

ATTENTION = tuple(name for name in SIZES if name.startswith("self_attn"))
ADAPTERS = {
    "a": {"rank": 4},
    "b": {"rank": 1, "targets": ("self_attn.q_proj", "self_attn.v_proj")},
    "c": {"rank": 8, "targets": ("mlp.gate_proj", "mlp.down_proj", "self_attn.o_proj"), "use_rslora": True},
    "d": {"rank": 6, "targets": ATTENTION, "embedding": True, "head": True},
    "e": {"rank": 3, "head": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("mesh")
    write_base(made / "base")
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        write_adapter(made / name, seed=seed, **fields)
    return made


@pytest.fixture(scope="module")
def expected(folder):
    """Tokens of all that is asked, by transformers and peft: of the 32, and of the fifth adapter's two."""
    prompts = {name: [prompt(i) for i, other in enumerate(asked()) if other == name] for name in (None, *NAMES)}
    found = {name: iter(greedy(folder, name, texts, STEPS)) for name, texts in prompts.items()}
    return [next(found[name]) for name in asked()], greedy(folder, "e", [prompt(0), prompt(1)], STEPS)


@pytest.fixture(scope="module")
def results(folder):
    """What every mesh answered; one process, because the number of CPU devices is fixed at its start."""
    command = [sys.executable, "-m", "tests.serving.adapters.mesh_run", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", MESHES)
def test_the_tokens_of_peft_in_one_batch_while_a_fifth_comes_and_goes(results, expected, mesh):
    tokens, fifth = expected
    assert len({tuple(answer) for answer in tokens}) > 20, "the adapters say something else each"
    assert results[mesh]["tokens"] == tokens
    assert results[mesh]["fifth"] == fifth * 2
    assert results[mesh]["loaded"] > len(ADAPTERS), "there is no room for the fifth beside the others"


def test_two_processes_load_the_same(folder, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling is most of the time
    flags = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--max-num-seqs", "2")
    flags += ("--max-num-batched-tokens", "64", "--kv-cache-memory", "4MB")
    modules = ("--lora-modules", f"a={folder / 'a'}", f"d={folder / 'd'}", f"e={folder / 'e'}")
    files = folder / "base", tmp_path / "programs"
    with pair(files, *flags, *modules, mesh="data=2,model=2") as (leader, _), stub(leader) as inference:

        def one(index, name):
            params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)
            wanted = pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=prompt(index)), sampling_params=params, adapter=name or ""
            )
            return inference.Generate(wanted)

        mixed = [(i, name) for i, name in enumerate(asked()) if name in (None, "a", "d")][:9]
        streams = [one(index, name) for index, name in mixed]
        found = [[token for message in stream for token in message.token_ids] for stream in streams]
        assert found == [expected[0][index] for index, _ in mixed]
        assert [token for message in one(1, "e") for token in message.token_ids] == expected[1][1], "by eviction"
