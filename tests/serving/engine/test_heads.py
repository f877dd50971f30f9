"""Heads beside the decoder say what transformers' layers say under the papers' formulas, and change no token."""

from __future__ import annotations

import numpy as np
import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.llm import LLM
from tests.tiny_heads import Reference, write_base, write_eagle3, write_mtp

SIZES = {
    "max_num_seqs": 2,
    "max_num_batched_tokens": 32,
    "max_model_len": 96,
    "kv_cache_memory": "4MiB",
    "page_size": 16,
}
SETTINGS = {**SIZES, "dtype": "float32", "progress": False}
PROMPTS = [list(range(7, 47)), [50, 60, 70, 80], list(range(7, 40)), [9] * 17]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


class Overheard:
    """What a head guessed, and behind which tokens."""

    def __init__(self, llm: LLM) -> None:
        engine = llm._started.engine
        self.found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        runner, draft = engine.runner, engine.runner.executor.draft
        have_drafted = runner._have_drafted

        def told(plan, plans, bucket, slots):
            drafted = have_drafted(plan, plans, bucket, slots)
            if drafted:
                guesses = np.asarray(draft.drafts)
                for row, (request, drafts) in enumerate(zip(plan.decode, plan.drafts, strict=True)):
                    if drafts:
                        self.found.append((tuple(request.tokens), tuple(guesses[row, : len(drafts)].tolist())))
            return drafted

        runner._have_drafted = told


def generated(llm: LLM, prompts=PROMPTS, params=GREEDY) -> list[list[int]]:
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [list(out.outputs[0].token_ids) for out in llm.generate(given, params, use_tqdm=False)]


def agrees(model: str, reference: Reference, how: dict) -> None:
    """Tokens are transformers', from prefixes too; and each guess is the reference's."""
    expected = [reference.greedy(prompt, GREEDY.max_tokens) for prompt in PROMPTS]
    how = {"num_speculative_tokens": 2, "enable_adaptive_verification": False, **how}
    with LLM(model, speculative_config=how, **SETTINGS) as llm:
        heard = Overheard(llm)
        assert generated(llm) == expected
        count = len(heard.found)
        assert count > 40
        for tokens, guesses in heard.found[:: max(1, count // 25)]:
            assert reference.guesses(list(tokens), len(guesses)) == list(guesses), len(tokens)
        assert generated(llm) == expected, "the second time from prefixes"
        llm._started.engine.runner.guard.check()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        "glm-4.5",
        *(pytest.param(name, marks=SLOW) for name in ("deepseek v3", "glm-4.7 flash", "qwen3.5", "qwen3-next")),
    ],
)
def test_a_head_of_the_checkpoint(tmp_path, name):
    reference = write_mtp(tmp_path / "model", name)
    agrees(str(tmp_path / "model"), reference, {"method": "mtp"})


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"speculators": True, "norm_before_residual": True, "rows": 384, "own_table": True}, marks=SLOW),
    ],
    ids=["own-format", "speculators"],
)
def test_an_eagle3_head(tmp_path, options):
    model = write_base(tmp_path / "model")
    reference = write_eagle3(tmp_path / "head", model, **options)
    agrees(str(tmp_path / "model"), reference, {"method": "eagle3", "model": str(tmp_path / "head")})
