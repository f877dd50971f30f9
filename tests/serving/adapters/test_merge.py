"""Merged adapters: the weights and logits of peft's own merge, and what does not fit."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from serving.convert import merge
from tests.models.adapters.make import EMBED, VOCAB, write_adapter, write_base
from tests.models.tiny_reference import make_reference
from tests.serving.adapters.test_experts import taken_apart

TOKENS = [3, 99, 4, 17, 201, 17, 17, 8, 250, 31]


def made_by_peft(folder, name, **config):
    """An adapter with random matrices of a base in `folder / "base"`."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=12, **config))
    with torch.no_grad():
        for parameter_name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "lora_A" not in parameter_name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder / name)
    return folder / name


def logits(path, adapter=None, merged=True):
    """Of transformers, with peft's merge where there is an adapter. That changes the table with a tied head, which the adapter
    beside its base does not: there `merged` is to be False."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
        model = model.merge_and_unload() if merged else model
    with torch.no_grad():
        return model.eval()(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize(
    ("tied", "config"),
    [
        (False, {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "rank_pattern": {"q_proj": 2}}),
        (False, {"target_modules": "all-linear", "use_dora": True}),
        (False, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
        (True, {"target_modules": ["lm_head", "k_proj"], "use_rslora": True}),
    ],
    ids=["embedding", "dora", "whole_weights", "tied_head"],
)
def test_the_same_logits_as_pefts_merge(tmp_path, tied, config):
    write_base(tmp_path / "base", tied=tied)
    adapter = made_by_peft(tmp_path, "adapter", **config)
    assert merge(str(tmp_path / "base"), str(adapter), tmp_path / "out", dtype="float32") > 1
    wanted, base = logits(tmp_path / "base", adapter, merged=not tied), logits(tmp_path / "base")
    assert np.abs(wanted - base).max() > 0.1
    np.testing.assert_allclose(logits(tmp_path / "out"), wanted, atol=1e-4)


def test_experts_of_all_in_one_and_one_by_one(tmp_path):
    make_reference("qwen3moe", tmp_path / "base")
    fused = made_by_peft(
        tmp_path, "fused", target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    taken_apart(fused, tmp_path / "apart", 8, "proj")
    wanted = logits(tmp_path / "base", fused)
    for name in ("fused", "apart"):
        merge(str(tmp_path / "base"), str(tmp_path / name), tmp_path / f"out-{name}", dtype="float32")
        np.testing.assert_allclose(logits(tmp_path / f"out-{name}"), wanted, atol=1e-4, err_msg=name)


def test_what_does_not_fit_is_told_and_leaves_nothing(tmp_path):
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.9.mlp.up_proj.weight"] = np.zeros((VOCAB, EMBED), np.float32)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"1 of its 15 weights change none of the base \(model.layers.9"):
        merge(str(base), str(adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    command = [sys.executable, "-m", "serving.convert", "--model", str(base), "--adapter", str(tmp_path), "--out"]
    told = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert told.returncode == 1 and told.stderr.startswith("error: ") and "not a PEFT adapter" not in told.stdout
