"""Adapters that peft makes of every family's linear weights, routers and recurrent layers' among them: the logits are peft's."""

from __future__ import annotations

import json

import numpy as np
import pytest

from models.loading import opening
from models.loading.load import in_float32
from models.loading.source import resolve
from tests.models.adapters.beside import Beside
from tests.models.paged import PagedModel
from tests.models.tiny_reference import random_model

NEW, PROMPTS = 4, (24, 9)

QUICK = ("qwen2moe, every layer", "mamba 2")
"""Routers and gates of experts; a tensor of which two weights here have a part. The engine is the same for all."""
FAMILIES = (
    *QUICK, "gpt2", "phi3, partial rotary", "gemma3", "cohere 2", "starcoder2", "mixtral", "qwen3moe", "gpt-oss", "llama4", "olmoe",
    "granitemoe", "minimax-m2", "glm-4.5", "qwen3-next", "qwen3.5", "falcon h1", "bamba", "mamba", "jamba", "granite 4", "lfm2 moe",
    "nemotron-h", "olmo hybrid", "gemma 4, per-layer embeddings, shared pages", "gemma 3n",
)  # fmt: skip

NOT_THOSE = r".*(kv_b_proj|dt_proj|(mixer|mamba)\.(out_proj|conv1d)|feed_forward\.router)"
"""What is refused here (docs/adapters.md), and where peft refuses, fails, or (dt_proj, of which transformers takes the weight past
the module) changes nothing."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FAMILIES])
def test_all_linear_weights(name, tmp_path):
    import peft
    import torch

    base = random_model(name)
    base.save_pretrained(tmp_path / "base")
    opened = opening.open_checkpoint(resolve(str(tmp_path / "base")))
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules="all-linear", rank_pattern={r"layers\.0\..*": 2}, alpha_pattern={"o_proj": 5},
        exclude_modules=NOT_THOSE,
    )  # fmt: skip
    wrapped = peft.get_peft_model(base, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for part, parameter in wrapped.named_parameters():
            if "lora_B" in part:
                parameter.normal_(0.0, 0.15)
    wrapped.save_pretrained(tmp_path / "adapter")
    assert len(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]) > 1
    tokens = np.random.default_rng(1).integers(3, 380, 64).tolist()
    prompts = [tokens[:length] for length in PROMPTS]
    adapted = Beside(in_float32(opened, 64), tmp_path / "adapter", opened.checkpoint)
    for found, logits in PagedModel(adapted, max_len=64).generate(prompts, NEW):
        with torch.no_grad():
            wanted = wrapped(torch.tensor([found[:-1]]), use_cache=False).logits[0].numpy()
        assert np.abs(logits - wanted).max() < 1e-4 * np.abs(wanted).max(), name
