"""Real checkpoints against transformers, both in float32 on the same dequantized weights.

The default model is fetched by our own loader. Others: set JAXSERVE_TEST_MODELS to a folder with GGUF files.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from models.loading.load import load_model, resolve
from tests.models.paged import PagedModel

PROMPTS = (
    "The capital of France is Paris. It lies on the river Seine, and in 2024 it held the Olympic Games. Its old",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
)
STEPS = 12
FOLDER = os.environ.get("JAXSERVE_TEST_MODELS")
OTHERS = sorted(Path(FOLDER).glob("*.gguf")) if FOLDER else []


def check(source) -> None:
    import torch
    import transformers

    folder, file = source.path.parent, source.path.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    loaded = load_model(source, max_model_len=160, progress=False)
    results = PagedModel(loaded.model).generate(prompts, STEPS)
    del loaded
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    for tokens, logits in results:
        with torch.no_grad():
            wanted = reference(torch.tensor([tokens[:-1]])).logits[0].numpy()
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-3)
        second, first = np.sort(wanted, axis=-1)[:, -2:].T
        clear = first - second > 1e-3
        assert (logits.argmax(-1) == wanted.argmax(-1))[clear].all()
        assert clear.mean() > 0.9


@pytest.mark.real_model
def test_default_model():
    check(resolve(None, progress=False))


@pytest.mark.skipif(not OTHERS, reason="JAXSERVE_TEST_MODELS does not name a folder with GGUF files")
@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_other_checkpoints(path):
    check(resolve(str(path)))
