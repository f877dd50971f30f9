"""Adapters on the default model against transformers with peft: greedy tokens and log probabilities in float32, of four adapters
and a fifth, for which there is no slot beside them, all mixed with the base in one batch."""

from __future__ import annotations

import numpy as np
import pytest

from models.loading.default_model import default_model
from serving import LLM, LoRARequest, SamplingParams

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

NEW_TOKENS, REQUESTS = 64, 32
TOLERANCE = 1e-4
"""Of a log probability."""
# No adapter may be called as a module is: peft leaves tensors of such modules out of what it saves.
CONFIGS = {
    "all": {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"},
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "feedforward": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["gate_proj", "down_proj"],
        "rank_pattern": {r"layers\.3\..*": 3},
    },
    "head": {"r": 2, "lora_alpha": 2, "target_modules": ["lm_head", "o_proj"]},
    "fifth": {"r": 1, "lora_alpha": 2, "target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1, 2, 20]},
}
TEXTS = (
    "The lighthouse keeper",
    "In 1897 the city",
    "def fibonacci(n):",
    "Dear Sir or Madam,",
    "Water boils when",
    "Once upon a time",
)


@pytest.fixture(scope="module")
def peft_model(tmp_path_factory):
    """(transformers' model with all adapters, the folder that has them)."""
    import peft
    import torch
    import transformers

    folder, gguf = tmp_path_factory.mktemp("adapters"), default_model(progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )  # fmt: skip
    torch.manual_seed(4)
    wrapped = None
    for name, fields in CONFIGS.items():
        config = peft.LoraConfig(**fields)
        if wrapped is None:
            wrapped = peft.get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    assert wrapped is not None
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.02)
    wrapped.save_pretrained(folder)
    return wrapped.eval(), folder


def test_five_adapters_mixed_with_the_base_in_one_batch(peft_model):
    import torch

    wrapped, folder = peft_model
    names = ([None, *CONFIGS] * REQUESTS)[:REQUESTS]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
    with LLM(
        dtype="float32", quantization="none", max_model_len=128, max_num_seqs=REQUESTS, max_num_batched_tokens=64,
        kv_cache_memory="256MiB", enable_lora=True, max_loras=4, max_lora_rank=16, progress=False,
    ) as llm:  # fmt: skip
        texts = [TEXTS[i // 6 % len(TEXTS)] for i in range(REQUESTS)]
        who = [None if name is None else LoRARequest(name, 1, str(folder / name)) for name in names]
        outputs = llm.generate(texts, params, use_tqdm=False, lora_request=who)
        assert llm._started.engine.scheduler.adapters.num_loaded >= len(CONFIGS)
        llm._started.engine.runner.guard.check()
    said, furthest = set(), 0.0
    for text, name, output in zip(texts, names, outputs, strict=True):
        prompt, found = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        if name is not None:
            wrapped.set_adapter(name)
        with torch.no_grad():
            ids = torch.tensor([prompt + found[:-1]])
            if name is None:
                with wrapped.disable_adapter():
                    logits = wrapped(input_ids=ids).logits[0]
            else:
                logits = wrapped(input_ids=ids).logits[0]
        wanted_TV = logits[len(prompt) - 1 :].log_softmax(-1).numpy()
        own_T = wanted_TV[np.arange(len(found)), found]
        assert (wanted_TV.max(axis=1) - own_T).max() < TOLERANCE, f"{name}: another token"
        ours_T = np.array(
            [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, found, strict=True)]
        )
        furthest = max(furthest, float(np.abs(ours_T - own_T).max()))
        said.add((text, round(float(ours_T.sum()), 3)))
    assert furthest < TOLERANCE, furthest
    assert len(said) == REQUESTS, "each adapter changes what its requests are given"
