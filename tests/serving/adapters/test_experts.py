"""Adapters of experts, in both layouts and in GGUF, against transformers with peft on tiny mixtures."""

from __future__ import annotations

import gc
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from serving import LLM, LoRARequest, SamplingParams
from tests.models.adapters.gguf_form import write_gguf_adapter
from tests.models.tiny_reference import make_reference
from tests.serving.adapters.conftest import SETTINGS
from tests.serving.adapters.oracle import adapted, greedy

STEPS = 12
PROMPTS = [[3, 99, 4, 17, 201, 17, 17, 8, 250, 31], [9, 9, 44], list(range(40, 90))]


@pytest.fixture(scope="module", params=[pytest.param("qwen3moe", marks=pytest.mark.slow), "mixtral"])
def folder(request, tmp_path_factory):
    """A mixture; an adapter that peft made, of all experts in one; the same with a module an expert."""
    import peft
    import torch

    made = tmp_path_factory.mktemp("experts")
    make_reference(request.param, made / "base")
    with adapted(made, None) as model:
        config = peft.LoraConfig(
            r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        )  # fmt: skip
        wrapped = peft.get_peft_model(model, config)
        torch.manual_seed(3)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
        wrapped.save_pretrained(made / "fused")
        experts = model.config.get_text_config().num_local_experts
    taken_apart(made / "fused", made / "apart", experts, "w" if request.param == "mixtral" else "proj")
    return made


def taken_apart(fused, apart, E, style):
    """The adapter with one module an expert, as Megatron's is: gate and up share their A."""
    shutil.copytree(fused, apart)
    tensors, out = load_file(fused / "adapter_model.safetensors"), {}
    names = ("w1", "w3", "w2") if style == "w" else ("gate_proj", "up_proj", "down_proj")
    where = "block_sparse_moe" if style == "w" else "mlp"
    for name, a in tensors.items():
        if ".experts." not in name:
            out[name] = a
        elif "lora_A" in name:
            b = tensors[name.replace("lora_A", "lora_B")]
            r = a.shape[0] // E
            stem = name.split(".mlp.")[0] + f".{where}.experts"
            for e in range(E):
                a_e, b_e = a.reshape(E, r, -1)[e], b.reshape(-1, r, E)[:, :, e]
                half = b_e.shape[0] // 2
                parts = (
                    [(names[2], b_e)]
                    if ".base_layer." not in name
                    else [(names[0], b_e[:half]), (names[1], b_e[half:])]
                )
                for part, rows in parts:
                    out[f"{stem}.{e}.{part}.lora_A.weight"] = np.ascontiguousarray(a_e)
                    out[f"{stem}.{e}.{part}.lora_B.weight"] = np.ascontiguousarray(rows)
    save_file(out, apart / "adapter_model.safetensors")


def test_both_layouts_mixed_with_the_base(folder):
    engine = LLM(str(folder / "base"), max_loras=3, **{**SETTINGS, "max_num_batched_tokens": 64})
    try:
        write_gguf_adapter(folder / "apart", folder / "base", folder / "adapter.gguf")
        expected = {name: greedy(folder, name, PROMPTS, STEPS) for name in (None, "fused")}
        assert expected[None] != expected["fused"]
        params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)
        paths = {"fused": folder / "fused", "apart": folder / "apart", "gguf": folder / "adapter.gguf"}
        names = [None, *paths] * len(PROMPTS)
        given = [{"prompt_token_ids": prompt} for prompt in PROMPTS for _ in range(4)]
        requests = [None if name is None else LoRARequest(name, 1, str(paths[name])) for name in names]
        found = engine.generate(given, params, use_tqdm=False, lora_request=requests)
        for i, output in enumerate(found):
            wanted = expected[None if names[i] is None else "fused"][i // 4]
            assert output.outputs[0].token_ids == wanted, (names[i], i // 4)
        infos = {info.name: info for info in engine._service.adapters.client.infos()}
        assert infos["fused"].rank == infos["apart"].rank == 4
        engine._started.engine.runner.guard.check()
    finally:
        engine.shutdown()
        gc.collect()


def test_experts_that_do_not_fit_are_refused(folder, tmp_path):
    from models.adapters.adapter import Base
    from models.adapters.peft import read_peft

    with pytest.raises(ValueError, match="the served model has no experts"):
        read_peft(folder / "fused", base=Base((), 2, (8, 4)))
    with pytest.raises(ValueError, match="has 5 experts of width"):
        read_peft(folder / "fused", base=Base((), 2, (8, 4), (5, 64, 32)))
    config = json.loads((folder / "fused" / "adapter_config.json").read_text())
    assert config["target_parameters"], "peft says which parameters they are for"
