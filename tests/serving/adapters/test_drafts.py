"""Drafts beside adapters: the base guesses, and the tokens are those of each adapter, of such that change logits too."""

from __future__ import annotations

from serving import LLM, LoRARequest, SamplingParams
from tests.models.adapters.make import write_adapter, write_base

SETTINGS = {
    "dtype": "float32", "max_model_len": 96, "max_num_seqs": 2, "max_num_batched_tokens": 32, "kv_cache_memory": "2MiB",
    "progress": False, "enable_lora": True, "max_lora_rank": 8, "max_loras": 2,
}  # fmt: skip


def test_each_adapter_says_what_it_says_without_drafts(tmp_path):
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

    how = {"model": base, "num_speculative_tokens": 2, "enable_adaptive_verification": False}
    with LLM(base, **SETTINGS) as plain:
        expected = told(plain)
    assert len(set(map(tuple, expected))) == len(names)
    with LLM(base, speculative_config=how, **SETTINGS) as llm:
        assert told(llm) == expected
        stats = llm.stats()
        assert stats.num_drafts > 10 and 0 < stats.num_accepted_tokens < stats.num_draft_tokens
        llm._started.engine.runner.guard.check()
