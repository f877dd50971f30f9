"""Plans of large models for TPU, compiled by the real TPU compiler. Skipped where libtpu is not installed.

`.ci/run` fetches libtpu for these; tests/ops/test_pallas_tpu_compiled.py says how to do it by hand.
"""

import json
import subprocess
import sys

import pytest

from serving.plan import topology

pytestmark = pytest.mark.skipif(
    not topology.tpu_compiler(), reason="libtpu, which has the TPU compiler, is not installed"
)


def plan(*arguments):
    """The JSON of a plan of the decode step, made in a process of its own."""
    command = [sys.executable, "-m", "serving.plan", *arguments, "--decode-only", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def forward_of(plan):
    return next(program for program in plan["programs"] if program["name"].startswith("forward"))


def test_llama_70b_on_sixteen_v5e():
    """The table in docs/plan.md, by the same arithmetic."""
    made = plan(
        "--model", "Llama-3.1-70B", "--topology", "v5e:4x4", "--mesh", "model=16", "--quantization", "int8",
        "--max-num-seqs", "64",
    )  # fmt: skip
    assert made["fits"] and made["extrapolated_from_layers"] == [1, 2]
    L, D, F, V, h, heads, kv_heads, devices = 80, 8192, 28672, 128256, 128, 64, 16, 16  # 8 KV heads on 16: each twice
    layer = (heads + 2 * kv_heads) * h * D + heads * h * D + 3 * D * F
    int8 = (L * layer + V * D) / devices
    assert made["memory"]["weights"] == pytest.approx(int8 + 2 * V * D / devices, rel=0.01)  # the embedding is bfloat16
    assert made["memory"]["page"] == 16 * L * (kv_heads / devices) * 2 * h * 2
    forward = forward_of(made)
    count, _ = forward["collectives"]["all-reduce"]
    assert count == 2 * L + 1
    assert forward["flops"] == pytest.approx(2 * 64 * L * layer / devices, rel=0.1)
    assert forward["context_bytes"] == 64 * 1024 * made["memory"]["page"] / 16


def test_qwen3_235b_on_eight_v5p_with_an_expert_axis():
    made = plan(
        "--model", "Qwen3-235B-A22B", "--topology", "v5p:2x2x2", "--mesh", "model=4,expert=2", "--max-num-seqs", "64",
    )  # fmt: skip
    assert made["fits"]
    L, D, F, V, h, heads, kv_heads, E, k = 94, 4096, 1536, 151936, 128, 64, 4, 128, 8
    attention = (heads + 2 * kv_heads) * h * D + heads * h * D
    experts = 3 * D * F
    assert made["num_parameters"] / 1e9 == pytest.approx(235.09, abs=0.01)
    by_hand = 2 * (L * (attention / 4 + E * experts / 8) + 2 * V * D / 4)
    assert made["memory"]["weights"] == pytest.approx(by_hand, rel=0.01)  # norms and routers are whole on each device
    met = 1 - (1 - k / E) ** 64
    read = 2 * L * (attention / 4 + met * E * experts / 8)
    assert forward_of(made)["weight_bytes"] == pytest.approx(read, rel=0.01)


def test_llama_70b_in_four_bits_on_eight_v5e():
    """Five bits a weight; the head and half of v have eight and a half. Kernels hide no operations from the plan."""
    made = plan(
        "--model", "Llama-3.1-70B", "--topology", "v5e:2x4", "--mesh", "model=8", "--quantization", "int4", "--max-num-seqs", "64",
    )  # fmt: skip
    assert made["fits"] and made["quantization"] == "int4"
    L, D, F, V, h, heads, kv_heads = 80, 8192, 28672, 128256, 128, 64, 8
    qkv, rest = (heads + 2 * kv_heads) * h * D, heads * h * D + 3 * D * F
    least = (L * (qkv + rest) * 5 / 8 + V * D * (8.5 + 8.5) / 8) / 8
    most = (L * (qkv * 8.5 + (rest - D * F) * 5 + D * F * 8.5) / 8 + V * D * (8.5 + 16) / 8) / 8
    assert least < made["memory"]["weights"] < most
    assert forward_of(made)["flops"] == pytest.approx(2 * 64 * L * (qkv + rest) / 8, rel=0.15)


def test_a_packed_checkpoint_is_priced_as_it_is_stored(tmp_path):
    """Float8 in blocks, as DeepSeek has it: a byte a weight, and a 32nd for scales."""
    L, D, F, V = 2, 1024, 4096, 32768
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": V, "max_position_embeddings": 2048,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = plan("--model", str(tmp_path), "--topology", "v6e:2x2", "--mesh", "model=4", "--quantization", "auto")
    assert made["quantization"] == "stored"
    layers = L * (2 * D * D + D * D + 3 * D * F)
    wanted = layers * (1 + 4 / 128) / 4 + 2 * 2 * V * D / 4
    assert made["memory"]["weights"] == pytest.approx(wanted, rel=0.01)
