"""Drafts of every method are lossless: 30 greedy prompts of 64 tokens alone, and 64 requests with every option together, whose
prefixes are shared, whose prompts come in pieces, and for which there are too few pages.

Slow; `boot/test_draft.py` is the small one."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.llm import LLM
from tests.tiny_checkpoint import write_tiny_checkpoint
from tests.tiny_heads import write_base, write_eagle3, write_mtp

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "max_num_seqs": 8, "max_num_batched_tokens": 48, "max_model_len": 192, "kv_cache_memory": "512KiB", "page_size": 16,
    "dtype": "float32", "progress": False,
}  # fmt: skip
MEMORY = {
    "ngram": "256KiB",
    "suffix": "256KiB",
    "draft_model": "320KiB",
    "deepseek v3: mtp": "112KiB",
    "qwen3.5: mtp": "768KiB",
    "qwen3-next: ngram": "512KiB",
}
"""Where that would be pages enough for all."""
WORDS = 256
"""Token i below is the word w<i>, in every model here."""


def model(name: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """A checkpoint with a tokenizer, and how its tokens are guessed."""
    words = write_tiny_checkpoint(folder / "words")
    if name in ("ngram", "suffix", "draft_model"):
        more = {"model": str(write_tiny_checkpoint(folder / "draft", seed=8))} if name == "draft_model" else {}
        return str(words), {"method": name, **more}
    path = folder / "model"
    if name == "eagle3":
        write_eagle3(folder / "head", write_base(path))
        how: dict[str, Any] = {"method": "eagle3", "model": str(folder / "head")}
    else:
        family, method = name.split(": ")
        write_mtp(path, family)
        how = {"method": method}
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(words / file, path / file)
    return str(path), how


def options(i: int, rng: random.Random) -> SamplingParams:
    """One of every kind."""
    some = [rng.randrange(3, WORDS) for _ in range(40)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "logprobs": 3},
        {"temperature": 0.9, "seed": i},
        {"temperature": 0, "presence_penalty": 0.8, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
        {"temperature": 0, "min_tokens": 20, "stop_token_ids": some},
        {"temperature": 0.7, "seed": i, "top_p": 0.8, "stop": [f"w{token}" for token in some[:8]]},
        {"temperature": 0.5, "seed": i, "allowed_token_ids": list(range(100, 200))},
        {"temperature": 0, "allowed_token_ids": some},
        {"temperature": 0, "logit_bias": dict.fromkeys(some[:5], 5.0)},
        {"temperature": 1.0, "seed": i, "bad_words": [f"w{token}" for token in some]},
        {"temperature": 0.9, "seed": i, "n": 3},
    ]
    return SamplingParams(max_tokens=rng.choice([5, 24, 40]), ignore_eos=bool(i % 3), **kinds[i % len(kinds)])


def requests() -> tuple[list[dict[str, Any]], list[SamplingParams]]:
    rng = random.Random(5)
    stem = [rng.randrange(3, WORDS) for _ in range(70)]
    prompts, params = [], []
    for i in range(64):
        shared = stem[: rng.choice([0, 17, 32, 48, 70])]
        prompts.append({"prompt_token_ids": shared + [rng.randrange(3, WORDS) for _ in range(rng.randrange(1, 30))]})
        params.append(options(i, rng))
    return prompts, params


def said(outputs: list[Any]) -> list[Any]:
    return [[(list(one.token_ids), one.finish_reason, one.text) for one in o.outputs] for o in outputs]


@pytest.mark.parametrize(
    "name",
    ["ngram", "suffix", "draft_model", "deepseek v3: mtp", "qwen3.5: mtp", "qwen3-next: ngram", "eagle3"],
)
def test_lossless(tmp_path, name):
    path, how = model(name, tmp_path)
    how |= {"num_speculative_tokens": 3, "enable_adaptive_verification": False}
    if how["method"] == "ngram":
        how |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    greedy = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    prompts, params = requests()
    found = []
    plain = {**SETTINGS, "kv_cache_memory": MEMORY.get(name, SETTINGS["kv_cache_memory"])}
    for settings in (plain, {**plain, "speculative_config": how}):
        with LLM(path, **settings) as llm:
            mixed = said(llm.generate(prompts, params, use_tqdm=False))
            alone = [said(llm.generate([prompt], greedy, use_tqdm=False)) for prompt in prompts[:30]]
            found.append((mixed, alone))
            stats, counters = llm.stats(), llm._started.engine.scheduler.counters
            assert counters.preemptions > 0
            if not name.startswith(
                "qwen"
            ):  # prompts this short leave no snapshot of a state: `test_hybrid` has those that do
                assert counters.prefix_hits > 0
            llm._started.engine.runner.guard.check()
    assert stats.num_draft_tokens > 300 and stats.num_accepted_tokens > 0
    assert found[1] == found[0]


def test_on_meshes(tmp_path):
    """Replicas, and one model over two devices: heads with their rings, and states that are committed."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.engine.drafts_mesh_run", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("glm-4.5", "qwen3.5"):
        plain, *others = [case for key, case in found.items() if key.startswith(name)]
        assert plain["drafts"] == 0
        for case in others:
            assert case["tokens"] == plain["tokens"] and case["drafts"] > 0
