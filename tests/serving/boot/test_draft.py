"""A draft model from a checkpoint, through the whole start."""

from __future__ import annotations

import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.llm import LLM
from tests.tiny_checkpoint import write_tiny_checkpoint
from tests.tiny_heads import write_mtp

SIZES = {"max_num_seqs": 1, "max_num_batched_tokens": 32, "max_model_len": 96, "kv_cache_memory": "1MiB"}
SETTINGS = {**SIZES, "dtype": "float32", "compile_cache": "", "progress": False}
DRAFTED = {"num_speculative_tokens": 3, "enable_adaptive_verification": False}


def test_a_checkpoint_guesses_for_another(tmp_path):
    """The same weights twice: nearly every guess is right, and no token is another's, of a request with a mask neither."""
    model = str(write_tiny_checkpoint(tmp_path / "model"))
    params = [
        SamplingParams(temperature=0.7, seed=5, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=0.7, seed=5, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, allowed_token_ids=list(range(100, 200))),
    ]
    prompts = [{"prompt_token_ids": tokens} for tokens in ([7, 8, 9], [50, 60, 70, 80], [5, 6])]
    how = {"model": model, **DRAFTED}
    with LLM(model, **SETTINGS) as plain, LLM(model, speculative_config=how, **SETTINGS) as drafted:
        expected = [out.outputs[0].token_ids for out in plain.generate(prompts, params, use_tqdm=False)]
        assert [out.outputs[0].token_ids for out in drafted.generate(prompts, params, use_tqdm=False)] == expected
        stats = drafted.stats()
        assert stats.num_drafts > 15 and stats.num_accepted_tokens > 50, (
            "but for the one of which the draft does not know the mask"
        )
        assert len(expected[2]) == 40 and all(100 <= token < 200 for token in expected[2])


def greedy(llm: LLM) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    prompts = [{"prompt_token_ids": [7 + i, *[20, 21, 22, 23] * (1 + i)]} for i in range(5)]
    found = [list(out.outputs[0].token_ids) for out in llm.generate(prompts, params, use_tqdm=False)]
    llm._started.engine.runner.guard.check()
    return found


def same_with(model: str, how: dict, **settings) -> int:
    """Holds greedy tokens with drafts to those without; how many drafts were right."""
    with LLM(model, **SETTINGS, **settings) as llm:
        expected = greedy(llm)
    with LLM(model, speculative_config=how | DRAFTED, **SETTINGS, **settings) as llm:
        assert greedy(llm) == expected
        stats = llm.stats()
    assert stats.num_draft_tokens > 50
    return stats.num_accepted_tokens


LOOKUPS = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_quantized(tmp_path, quantization, method):
    """Weights of the model and of the draft alike."""
    model = str(write_tiny_checkpoint(tmp_path / "model"))
    how = LOOKUPS if method == "ngram" else {"method": method, "model": model}
    right = same_with(model, how, quantization=quantization)
    assert right > (100 if method == "draft_model" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ngram", "draft_model", "mtp"])
def test_pages_of_8_bits(tmp_path, method):
    """The model's and the draft's; the default beside rounded weights on CPUs that multiply such pages as they lie."""
    model = str(tmp_path / "model")
    if method == "mtp":
        write_mtp(tmp_path / "model", "glm-4.5")
    else:
        write_tiny_checkpoint(tmp_path / "model")
    how = {"ngram": LOOKUPS, "draft_model": {"method": method, "model": model}, "mtp": {"method": method}}[method]
    same_with(model, how, kv_cache_dtype="int8")


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_head_is_quantized(tmp_path, quantization):
    write_mtp(tmp_path / "model", "glm-4.5")
    same_with(str(tmp_path / "model"), {"method": "mtp"}, quantization=quantization)


@pytest.mark.slow
def test_several_steps_at_once(tmp_path):
    model = str(write_tiny_checkpoint(tmp_path / "model"))
    same_with(model, {"method": "draft_model", "model": model}, num_scheduler_steps=4)
