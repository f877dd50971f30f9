"""Drafts beside adapters: the base guesses, and the tokens are those of each adapter, of such that change logits too."""

from __future__ import annotations

import pytest
import transformers

from serving import LLM, LoRARequest, SamplingParams
from tests.models.adapters.make import write_adapter, write_base
from tests.tiny_heads import write_eagle3

SETTINGS = {
    "dtype": "float32", "max_model_len": 96, "max_num_seqs": 2, "max_num_batched_tokens": 32, "kv_cache_memory": "2MiB",
    "progress": False, "enable_lora": True, "max_lora_rank": 8, "max_loras": 2,
}  # fmt: skip


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "method", ["draft_model", pytest.param("eagle3", marks=SLOW), pytest.param("ngram", marks=SLOW)]
)
def test_each_adapter_says_what_it_says_without_drafts(tmp_path, method):
    base = str(write_base(tmp_path / "base"))
    write_adapter(tmp_path / "layers", rank=4, targets=("self_attn.q_proj", "mlp.down_proj"), seed=1)
    write_adapter(tmp_path / "head", rank=4, targets=(), head=True)
    names = [None, "layers", "head", None, "head"]
    prompts = [{"prompt_token_ids": [7 + i, 8, 9, 10]} for i in range(len(names))]
    who = [None if name is None else LoRARequest(name, 1, str(tmp_path / name)) for name in names]
    params = [
        SamplingParams(
            temperature=0.7 * (i % 2), seed=i, max_tokens=20, ignore_eos=True, presence_penalty=0.3 * (i == 4)
        )
        for i in range(len(names))
    ]

    def told(llm: LLM) -> list[list[int]]:
        return [
            list(out.outputs[0].token_ids) for out in llm.generate(prompts, params, use_tqdm=False, lora_request=who)
        ]

    how = {"method": method, "num_speculative_tokens": 2, "enable_adaptive_verification": False}
    if method == "draft_model":
        how["model"] = base
    elif method == "eagle3":
        of = transformers.LlamaForCausalLM.from_pretrained(base)
        write_eagle3(tmp_path / "drafts", of, eagle_aux_hidden_state_layer_ids=[0, 1, 2])
        how["model"] = str(tmp_path / "drafts")
    else:
        how |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    with LLM(base, **SETTINGS) as plain:
        expected = told(plain)
    assert len(set(map(tuple, expected))) == len(names)
    with LLM(base, speculative_config=how, **SETTINGS) as llm:
        assert told(llm) == expected
        stats = llm.stats()
        assert stats.num_drafts > 10 and stats.num_accepted_tokens < stats.num_draft_tokens
        assert stats.num_accepted_tokens > 0 or method == "eagle3", "a random head is hardly ever right"
        llm._started.engine.runner.guard.check()
