"""A draft model from a checkpoint, through the whole start."""

from __future__ import annotations

from serving.engine.api.sampling_params import SamplingParams
from serving.llm import LLM
from tests.tiny_checkpoint import write_tiny_checkpoint


def test_a_checkpoint_guesses_for_another(tmp_path):
    """The same weights twice: nearly every guess is right, and no token is another's, of a request with a mask neither."""
    model = str(write_tiny_checkpoint(tmp_path / "model"))
    sizes = {"max_num_seqs": 1, "max_num_batched_tokens": 32, "max_model_len": 96, "kv_cache_memory": "1MiB"}
    settings = {**sizes, "dtype": "float32", "compile_cache": "", "progress": False}
    params = [
        SamplingParams(temperature=0.7, seed=5, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=0.7, seed=5, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, allowed_token_ids=list(range(100, 200))),
    ]
    prompts = [{"prompt_token_ids": tokens} for tokens in ([7, 8, 9], [50, 60, 70, 80], [5, 6])]
    how = {"model": model, "num_speculative_tokens": 3, "enable_adaptive_verification": False}
    with LLM(model, **settings) as plain, LLM(model, speculative_config=how, **settings) as drafted:
        expected = [out.outputs[0].token_ids for out in plain.generate(prompts, params, use_tqdm=False)]
        assert [out.outputs[0].token_ids for out in drafted.generate(prompts, params, use_tqdm=False)] == expected
        stats = drafted.stats()
        assert stats.num_drafts > 15 and stats.num_accepted_tokens > 50, (
            "but for the one of which the draft does not know the mask"
        )
        assert len(expected[2]) == 40 and all(100 <= token < 200 for token in expected[2])
