"""A request's tokens and log-probabilities are the same, to the last bit, whatever else runs: a CPU's default configuration."""

import json
import random
from typing import Any

import pytest

from ops import native
from serving.engine.api.sampling_params import SamplingParams
from serving.llm import LLM
from tests.tiny_checkpoint import VOCAB, write_tiny_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2)
SETTINGS: dict[str, Any] = {
    "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 384, "kv_cache_memory": "200KiB", "progress": False,
}  # fmt: skip
"""Prompts come in pieces, and 8 of them do not have enough pages together."""


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    if not native.available():
        pytest.skip(native.status())
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    with LLM(str(path), **SETTINGS) as llm:
        yield llm


def said(llm: Any, prompts: list[list[int]]) -> list[Any]:
    given: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs: Any = [output.outputs[0] for output in llm.generate(given, GREEDY, use_tqdm=False)]
    return [
        [
            (token, sorted((t, p.logprob) for t, p in some.items()))
            for token, some in zip(o.token_ids, o.logprobs, strict=True)
        ]
        for o in outputs
    ]


def test_a_request_does_not_depend_on_what_else_runs(llm):
    rng = random.Random(3)
    # Eight that grow into each other's pages, and from one token to more than the 256 keys that attention adds up at once.
    lengths = [58, 59, 60, 61, 58, 59, 60, 61, 1, 2, 15, 16, 17, 130, 255, 256, 257, 340]
    prompts = [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]
    alone = [said(llm, [prompt])[0] for prompt in prompts]
    counters = llm._started.engine.scheduler.counters
    preempted = counters.preemptions
    assert said(llm, prompts) == alone
    assert counters.preemptions > preempted
    hits = counters.prefix_hits
    assert [said(llm, [prompts[-1]])[0] for _ in range(2)] == [alone[-1]] * 2
    assert counters.prefix_hits > hits
    assert llm.stats().num_recompilations == 0
