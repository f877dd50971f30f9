"""Reading PEFT directories: what is read right, and what is refused in a sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.adapters.peft import read_peft
from tests.models.adapters.make import write_adapter

Q = "model.layers.0.self_attn.q_proj.weight"


def edit(folder, **tensors):
    """Changes tensors of an adapter; None takes one away."""
    path = folder / "adapter_model.safetensors"
    kept = {**load_file(path), **tensors}
    save_file({name: value for name, value in kept.items() if value is not None}, path)
    return folder


def test_scales_are_in_b(tmp_path):
    plain = read_peft(write_adapter(tmp_path / "a"))
    assert plain.rank == 4 and len(plain.pairs) == 14
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    b = stored["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    np.testing.assert_allclose(plain.pairs[Q].b_Or, 2 * b)  # alpha / r = 8 / 4
    rs = read_peft(write_adapter(tmp_path / "b", use_rslora=True))
    np.testing.assert_allclose(rs.pairs[Q].b_Or, 4 * b)  # alpha / sqrt(r) = 8 / 2
    patterns = {r"layers\.0\.self_attn\.q_proj": 12, "k_proj": 2}
    by_pattern = read_peft(write_adapter(tmp_path / "c", alpha_pattern=patterns))
    np.testing.assert_allclose(by_pattern.pairs[Q].b_Or, 3 * b)
    k = "model.layers.1.self_attn.k_proj"
    b_k = stored[f"base_model.model.{k}.lora_B.weight"]
    np.testing.assert_allclose(by_pattern.pairs[f"{k}.weight"].b_Or, 0.5 * b_k)


def test_an_adapter_saved_under_a_name_lies_one_folder_deeper(tmp_path):
    write_adapter(tmp_path / "outer" / "french")
    assert read_peft(tmp_path / "outer").rank == 4
    write_adapter(tmp_path / "outer" / "german")
    with pytest.raises(ValueError, match="several adapters: french, german"):
        read_peft(tmp_path / "outer")


def test_the_digest_is_of_the_content_not_of_the_name(tmp_path):
    one, same, other = (
        read_peft(write_adapter(tmp_path / name, seed=seed)).digest() for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one == same != other
    assert read_peft(write_adapter(tmp_path / "d", use_rslora=True)).digest() != one


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "biases of the base"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "PiSSA_niter_4"}, "PiSSA_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"kasa_config": {"beta": 0.1}}, "KaSA"),
        ({"arrow_config": {"top_k": 2}}, "Arrow"),
        ({"monteclora_config": {"num_samples": 4}}, "Monte Carlo"),
        ({"init_lora_weights": ["x"]}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"alora_invocation_tokens": [1]}, "activated"),
        ({"layer_replication": [[0, 1]]}, "replicated"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
    ],
)
def test_what_would_be_served_wrongly_is_refused(tmp_path, config, says):
    with pytest.raises(ValueError, match=says):
        read_peft(write_adapter(tmp_path / "a", **config))


def test_every_tensor_is_accounted_for(tmp_path):
    name = "base_model.model.lm_head.weight"
    folder = edit(write_adapter(tmp_path / "a"), **{name: np.zeros((3, 4), np.float32)})
    with pytest.raises(ValueError, match="lm_head"):
        read_peft(folder)
    a = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    with pytest.raises(ValueError, match=r"up_proj has a lora_B and no lora_A"):
        read_peft(edit(write_adapter(tmp_path / "b"), **{a: None}))
    with pytest.raises(ValueError, match="rank 3 and a lora_B of rank 4"):
        read_peft(edit(write_adapter(tmp_path / "c"), **{a: np.zeros((3, 48), np.float32)}))
    with pytest.raises(ValueError, match="not finite"):
        read_peft(edit(write_adapter(tmp_path / "d"), **{a: np.full((4, 48), np.nan, np.float32)}))
    with pytest.raises(ValueError, match="a matrix is needed"):
        read_peft(edit(write_adapter(tmp_path / "e"), **{a: np.zeros(4, np.float32)}))


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="not a PEFT adapter"):
        read_peft(tmp_path)
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="may run code"):
        read_peft(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors"):
        read_peft(folder)
    (folder / "adapter_config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="not a JSON object"):
        read_peft(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(ValueError, match="not JSON"):
        read_peft(folder)
