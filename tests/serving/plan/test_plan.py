"""serving.plan: its arithmetic against arithmetic done by hand, and extrapolation against compiling every layer."""

import dataclasses
import json
import subprocess
import sys

import pytest

from serving.plan import chips, facts
from serving.plan.__main__ import candidate_meshes, guarded, main
from serving.plan.measure import Collective, collectives
from serving.plan.programs import config_of, layer_periods, with_layers


@pytest.fixture(scope="module")
def plans():
    """Extrapolated plan, whole plan, and the two texts; a process of its own, for its two CPU devices."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.plan.plan_run"], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_extrapolation_is_exact(plans):
    extrapolated, whole = plans[:2]
    assert extrapolated["extrapolated_from_layers"] == [1, 2] and whole["extrapolated_from_layers"] is None
    assert extrapolated["memory"]["weights"] == whole["memory"]["weights"]
    for few, all_layers in zip(extrapolated["programs"], whole["programs"], strict=True):
        assert few["name"] == all_layers["name"]
        for name in ("flops", "bytes_accessed", "arguments", "outputs", "aliased"):
            # The last layer leaves out rows that nobody reads, which the compiler fuses in one way or another.
            near = 0.01 if name in ("flops", "bytes_accessed") and "chunk" in few["name"] else 1e-9
            assert few[name] == pytest.approx(all_layers[name], rel=near), (few["name"], name)
        assert few["collectives"] == all_layers["collectives"]


def test_memory_is_weights_and_pages_by_hand(plans):
    plan = plans[1]
    D, F, V, L, h = 64, 96, 256, 5, 16
    layer = (4 + 2 * 2) * h * D + 4 * h * D + 3 * D * F  # matrices of one layer
    matrices = L * layer + 2 * V * D  # all are cut in two
    norms = (2 * L + 1) * D  # whole on each device
    assert plan["num_parameters"] == matrices + norms
    assert plan["memory"]["weights"] == 4 * (matrices // 2 + norms)
    assert plan["memory"]["page"] == L * 16 * 2 * h * 4  # one of two KV heads: 16 positions of K and V in float32
    taken = ("weights", "adapters", "state", "temporaries", "code")
    free = plan["memory"]["usable"] - sum(plan["memory"][part] for part in taken)
    assert plan["num_pages"] == min(free // plan["memory"]["page"], 4 * 16 + 1)
    assert plan["fits"] and plan["max_concurrent_requests"] == 4


def test_room_for_adapters_is_memory_that_pages_do_not_have(plans):
    """Three adapters of rank 8 and nobody's; q, k and v (gate and up) have 24 (16) columns of B. Cut is what the weight's cut axis
    is: rows of B, or columns of A."""
    D, F, V, L, heads, kv = 64, 96, 256, 5, 64, 32
    layer = 24 * (D + (heads + 2 * kv) // 2) + 8 * (heads // 2 + D) + 16 * (D + F) + 8 * (F // 2 + D)
    outside = 8 * (V + D) + 8 * (D + V // 2)  # the table's rows, whole; the head
    assert plans[1]["memory"]["adapters"] == 4 * 4 * (L * layer + outside)
    assert plans[0]["memory"]["adapters"] == 0
    assert "3 adapters of rank 8" in plans[6] and "adapters" not in plans[2]


def test_a_tower_is_its_weights_and_room_for_what_it_makes(plans):
    """Two devices: heads and feed-forward are cut, what stands in front of them and norms are not."""
    D, F, mels, positions = 32, 48, 80, 1500
    whole = 3 * mels * D + D + 3 * D * D + D + positions * D + 2 * (2 * 2 * D + D + D) + 2 * D
    cut = 2 * (3 * D * D + 3 * D + D * D + F * D + F + D * F) + 2 * (2 * D * D + 2 * D)
    assert plans[-1]["tower_alone"] == 4 * (whole + cut // 2) + 2**29
    assert plans[-1]["no_tower"] == 0 and plans[0]["memory"]["tower"] == 0


def test_windows_take_and_read_less(plans):
    """Four layers with a window of 32 and one that sees all: each is a group, and a page holds one layer's."""
    plan = plans[-1]
    page = 16 * 2 * 16 * 4  # of one layer: one of two KV heads, 16 positions of K and V of 16 in float32
    assert plan["attention_windows"] == [32, 32, None, 32, 32]
    assert plan["memory"]["page"] == page
    # At most, four requests of 256 tokens: 16 pages, and four times those of a window and a piece of 64.
    assert plan["num_pages"] == 4 * (16 + 4 * 8) + 1
    assert plan["pool_tokens"] == 4 * (16 + 4 * 8) * 112 // (
        7 + 4 * 4
    )  # of requests with 100 tokens: 7 pages, 4 of a window
    forward = next(p for p in plan["programs"] if p["name"] == "forward decode 4")
    assert forward["context_bytes"] == 4 * (100 + 4 * 32) * page / 16


def test_two_all_reduces_a_layer(plans):
    forward = next(p for p in plans[1]["programs"] if p["name"] == "forward decode 4")
    count, sent = forward["collectives"]["all-reduce"]
    assert count == 2 * 5 + 1 and list(forward["collectives"]) == ["all-reduce"]
    assert sent == count * 4 * 64 * 4  # a ring of two sends as much as the operand has: 4 rows of 64 float32


def test_steps_are_rooflines_by_hand(plans):
    plan = plans[1]
    forward = next(p for p in plan["programs"] if p["name"] == "forward decode 4")
    cpu = chips.CHIPS["cpu"]
    assert forward["context_bytes"] == 4 * 100 * plan["memory"]["page"] / 16
    read = forward["weight_bytes"] + forward["context_bytes"]
    assert forward["memory_seconds"] == pytest.approx(read / cpu.bandwidth)
    slower = max(forward["memory_seconds"], forward["matmul_seconds"])
    assert forward["seconds"] == pytest.approx(slower + forward["links_seconds"])
    sample = next(p for p in plan["programs"] if p["name"] == "sample 4")
    assert plan["decode_step_seconds"] == pytest.approx(forward["seconds"] + sample["seconds"])
    assert sample["weight_bytes"] == 256 * 64 * 4 / 2


def test_texts_name_what_matters(plans):
    page, sweep, quick, quick_sweep = plans[2:6]
    assert "FITS" in page and "forward decode 4" in page and "time to first token" in page
    assert "Recommended: --mesh model=2 on cpu:2" in sweep
    assert "decode:" in quick and "time to first token" not in quick and "Only the decode step" in quick
    assert quick_sweep.splitlines()[1].split()[-1] == "-"


def test_drafts_are_priced(plans):
    """The draft's weights and its part of each page are there, and a step that verifies costs what its rows cost."""
    text, plan = plans[-3:-1]
    page, memory = 16 * 2 * 16 * 4, plan["memory"]
    assert memory["draft_weights"] == memory["weights"] and memory["page"] == 2 * page
    assert [(step["requests"], step["places"]) for step in plan["verified"]] == [(1, 4), (4, 4)]
    forward = {p["name"]: p for p in plan["programs"]}
    plain, verified = forward["forward decode 1"], forward["forward decode 1x4"]
    assert verified["weight_bytes"] == plain["weight_bytes"] and verified["context_bytes"] == plain["context_bytes"]
    assert verified["matmul_seconds"] > plain["matmul_seconds"]
    assert all(step["tokens_needed"] >= 1 for step in plan["verified"])
    assert "weights of the draft model" in text and "verifying 3 drafts of 4 requests" in text


@pytest.mark.parametrize(
    "line,kind,nbytes,devices",
    [
        (
            "%a = bf16[256,8192]{1,0} all-reduce(%x), replica_groups=mesh['a'=16,'b'=1] {'a'}, to",
            "all-reduce",
            4 << 20,
            16,
        ),
        ("%a = f32[4,8]{1,0} all-gather(%x), replica_groups=[4,4]<=[16], dimensions={1}", "all-gather", 128, 4),
        ("%a = (s32[2]{0}, s32[4]{0}) all-gather-start(%x), replica_groups={{0,1},{2,3}}", "all-gather", 16, 2),
        ("%a = s8[10]{0} collective-permute(%x), source_target_pairs={{0,1}}", "collective-permute", 10, 0),
    ],
)
def test_collectives_are_read_from_compiled_programs(line, kind, nbytes, devices):
    (found,) = collectives(f"HloModule m\n  {line}\n  %b = f32[2] fusion(%all-reduce.1), kind=kLoop")
    assert found == Collective(kind, nbytes, devices)


def test_ring_costs():
    assert Collective("all-reduce", 800, 8).sent == 2 * 7 * 100
    assert Collective("all-gather", 800, 8).sent == 700
    assert Collective("collective-permute", 800, 0).sent == 800


@pytest.mark.parametrize(
    "model,billions", [("Llama-3.1-8B", 8.03), ("meta-llama/Llama-3.1-70B-Instruct", 70.55), ("Qwen3-32B", 32.76)]
)
def test_facts_are_the_models_they_say(model, billions):
    config = config_of(facts.read_config(model))
    D, h = config.embed_dim, config.head_dim
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * h * D
    parameters = config.num_layers * (attention + 3 * D * config.ffw_dim + 2 * D) + 2 * config.vocab_size * D + D
    assert parameters / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("model", ["Qwen3-235B-A22B", "DeepSeek-V3"])
def test_mixtures_are_known_to_the_registry(model):
    config = config_of(facts.read_config(model))
    start, period = layer_periods(config)
    assert period == 1 and start == (3 if model == "DeepSeek-V3" else 0)
    few = with_layers(config, 5)
    assert few.num_layers == len(few.windows) == len(few.moe.layers) == 5


def test_patterns_of_layers_are_found():
    config = config_of(facts.read_config("Llama-3.1-8B"))
    assert layer_periods(config) == (0, 1)
    alternating = dataclasses.replace(config, windows=(None, 64) * 16)
    assert layer_periods(alternating) == (0, 2)
    assert layer_periods(dataclasses.replace(config, windows=(None,) * 2 + (64, 64, None) * 10)) == (1, 3)


def test_targets_are_read_or_explained():
    target = chips.parse_target("v5e:4x4")
    assert (target.num_devices, target.platform) == (16, "tpu")
    assert chips.parse_target("v5p:2x2x2").num_devices == 8
    assert chips.parse_target("cpu").num_devices == 1
    for text, said in (("v9:2x2", "not known"), ("v5e:2x2x2", "v5e:4x4"), ("v5p:4x4", "v5p:2x2x1"), ("cpu:x", "cpu:8")):
        with pytest.raises(ValueError, match=said):
            chips.parse_target(text)


def test_candidates_cover_every_power_of_two():
    assert candidate_meshes(8) == ["model=8", "data=2,model=4", "data=4,model=2", "data=8,model=1"]
    mixture = candidate_meshes(8, experts=True)[4:]
    assert mixture == ["model=4,expert=2", "model=2,expert=4", "model=1,expert=8"]


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--model", "nothing", "--topology", "cpu"], "No configuration for the model 'nothing'"),
        (["--model", "Llama-3.1-8B", "--topology", "h100:8"], "need the compiler in JAX's CUDA plugin"),
        (["--model", "Llama-3.1-8B", "--topology", "cpu", "cpu:2"], "--sweep"),
        (
            ["--model", "Llama-3.1-8B", "--topology", "cpu", "--save", "none", "--enable-lora"],
            "leave --enable-lora out",
        ),
    ],
)
def test_wrong_arguments_are_explained(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_compiler_that_ends_its_process_is_a_sentence():
    assert guarded([sys.executable, "-c", "raise SystemExit(1)"]) == 1
    with pytest.raises(ValueError, match="ended by SIGABRT while it compiled"):
        guarded([sys.executable, "-c", "import os; os.abort()"])


def test_plans_for_tpu_are_compiled_in_a_process_of_their_own(monkeypatch):
    ran = []
    monkeypatch.setattr("serving.plan.__main__.guarded", lambda command: ran.append(command) or 1)
    arguments = ["--model", "Llama-3.1-8B", "--topology", "v5e:2x4"]
    assert main(arguments) == 1
    assert ran == [[sys.executable, "-m", "serving.plan", *arguments, "--in-this-process"]]
