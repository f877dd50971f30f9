"""The served tokens against transformers on the same GGUF, dequantized to float32.

Every greedy token of our completion is checked against transformers' logits for exactly that prefix (one forward pass over
prompt and completion), so a divergence is found where it happens and nothing after it is compared for nothing. Where the
reference's two best logits are within NEAR_TIE, either is right: such places are counted and printed.
"""

from __future__ import annotations

import asyncio
import os
import pathlib

import numpy as np
import pytest

from models.loading.default_model import default_model
from models.loading.gguf.file import GGUFFile
from serving.boot.start import start_engine
from serving.engine.api.config import EngineConfig
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.text.chat_template import ChatTemplate
from serving.text.tokenizer import Tokenizer

pytestmark = pytest.mark.real_model

NEAR_TIE = 1e-3
NEW_TOKENS = 64
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "List three uses of a paper clip.",
    "What is 17 times 23?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "Write a Python function that reverses a string.",
    "Why is the sky blue?",
    "Tell me a joke about cats.",
    "Summarize the plot of Romeo and Juliet in two sentences.",
    "What are the planets of the solar system?",
    "How do I boil an egg?",
    "Name five animals that live in the ocean.",
    "What does HTTP stand for?",
    "Write a polite email asking for a day off.",
    "What is the difference between a virus and a bacterium?",
    "Count from 1 to 20.",
    "Describe a sunset in the mountains.",
    "What is a prime number? Give 5 examples.",
    "How far away is the moon, in km?",
]


def checkpoints() -> list[pathlib.Path | None]:
    """The default model (None), and Qwen2.5-Coder and Gemma 3 where JAXSERVE_TEST_MODELS names a folder that has them."""
    folder = os.environ.get("JAXSERVE_TEST_MODELS")
    patterns = ("qwen2.5-coder-0.5b*.gguf", "gemma-3-270m*.gguf") if folder else ()
    return [None, *(path for pattern in patterns for path in sorted(pathlib.Path(folder or "").glob(pattern)))]


@pytest.mark.parametrize("path", checkpoints(), ids=lambda p: "default" if p is None else p.stem)
def test_greedy_tokens_are_those_of_transformers(path, capsys):
    path = path or default_model(progress=False)
    prompts, completions = complete(path)
    logits = reference_logits(path, [p + c for p, c in zip(prompts, completions, strict=True)])
    ties = []
    for i, (prompt, completion, rows) in enumerate(zip(prompts, completions, logits, strict=True)):
        for j, token in enumerate(completion):
            row = rows[len(prompt) - 1 + j]
            best = int(row.argmax())
            if token != best:
                gap = float(row[best] - row[token])
                assert gap < NEAR_TIE, f"prompt {i}, token {j}: {token} is {gap:.4f} below the reference's {best}"
                ties.append((i, j, token, best, gap))
    total = sum(map(len, completions))
    with capsys.disabled():
        print(f"\n{path.name}: {total} greedy tokens agree; near ties decided the other way: {ties or 'none'}")
    assert total >= len(QUESTIONS) * 8
    assert len(ties) <= total // 200


def complete(path: pathlib.Path) -> tuple[list[list[int]], list[list[int]]]:
    """Our greedy completions of all questions, batched and chunked as the server does it. A base model, which has no chat
    template, goes on with the question as it is, past any end of text."""
    tokenizer = Tokenizer.from_gguf(GGUFFile(path).metadata)
    template = ChatTemplate.from_tokenizer(tokenizer)
    if template is None:
        prompts = [tokenizer.encode(q) for q in QUESTIONS]
    else:
        prompts = [template.encode(tokenizer, [{"role": "user", "content": q}])[1] for q in QUESTIONS]
    config = EngineConfig(
        model=str(path),
        dtype="float32",
        quantization="none",
        max_model_len=512,
        max_num_seqs=4,  # the sizes of test_llm.py too: what one has compiled, the other finds
        max_num_batched_tokens=64,
        progress=False,
    )
    engine = start_engine(config)
    try:

        async def one(i: int) -> list[int]:
            params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=template is None)
            request = EngineRequest(f"q{i}", tuple(prompts[i]), params, eos_token_ids=tokenizer.eos_token_ids)
            return [t async for output in engine.client.generate(request) for t in output.token_ids]

        async def every() -> list[list[int]]:
            return list(await asyncio.gather(*(one(i) for i in range(len(prompts)))))

        completions = asyncio.run(every())
        engine.runner.guard.check()
    finally:
        engine.shutdown()
    return prompts, completions


def reference_logits(path: pathlib.Path, sequences: list[list[int]]) -> list[np.ndarray]:
    """transformers' float32 logits [len, V] of each sequence."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    with torch.no_grad():
        return [model(torch.tensor([s])).logits[0].float().numpy() for s in sequences]
