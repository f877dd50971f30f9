"""all-MiniLM-L6-v2 served: `python -m serving.launch` and HTTP against transformers' mean pooling."""

from __future__ import annotations

import json
import os
import pathlib
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.e2e.test_server import process

FOLDER = os.environ.get("JAXSERVE_TEST_MODELS")
MINILM = pathlib.Path(FOLDER) / "minilm" if FOLDER else None
TEXTS = [
    "A man is eating food.",
    "Someone has a meal.",
    "The stock market fell by 3 % on Tuesday.",
    "ja",
    "A long text. " + "It goes on and on about nothing at all. " * 40,
    "def f(x): return x + 1  # [SEP] is text here",
    "Grüße aus Köln, où l'été est là.",
]


@pytest.mark.skipif(MINILM is None or not MINILM.exists(), reason="JAXSERVE_TEST_MODELS has no folder minilm")
def test_minilm_over_http_agrees_with_transformers():
    with process("--model", str(MINILM), "--port", "0", "--no-progress") as (_, read_to):
        url = read_to(r"ready at .*(http://\S+)")[1]
        got = np.array([d["embedding"] for d in ask(url, "/v1/embeddings", {"input": TEXTS})["data"]], np.float32)
        wanted = reference(TEXTS)
        assert got.shape == wanted.shape
        cosines = (got * wanted).sum(1) / np.linalg.norm(wanted, axis=1)
        assert (cosines > 1 - 1e-4).all(), cosines
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1.0, atol=1e-5)

        with ThreadPoolExecutor(16) as pool:  # concurrent requests give the same, and share batches
            again = list(pool.map(lambda text: ask(url, "/v1/embeddings", {"input": text}), TEXTS * 8))
        for i, reply in enumerate(again):
            assert reply["data"][0]["embedding"] @ got[i % len(TEXTS)] > 1 - 1e-5

        for path, body in (
            ("/v1/completions", {"prompt": "Hello"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
        ):
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask(url, path, body)
            assert refused.value.code == 501
            assert "does not complete text" in refused.value.read().decode()
        assert ask(url, "/v1/models")["data"][0]["id"] == "minilm"
        metrics = urllib.request.urlopen(f"{url}/metrics").read().decode()
        served = [line for line in metrics.splitlines() if line.startswith("jaxserve:prompt_tokens_total")]
        assert float(served[0].split()[-1]) > 0
        assert ask(url, "/health") == {"status": "ok"}


def ask(url: str, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps({"model": "default", **body}).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.loads(reply.read())


def reference(texts: list[str]) -> np.ndarray:
    """transformers' BertModel in float32, the mean of each text's hidden states."""
    import tokenizers
    import torch
    import transformers
    from safetensors.torch import load_file

    assert MINILM is not None
    tokenizer = tokenizers.Tokenizer.from_file(str(MINILM / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # "[SEP]" in a text is text
    model = transformers.BertModel(transformers.BertConfig.from_pretrained(MINILM)).eval()
    weights = {name: value.float() for name, value in load_file(next(MINILM.glob("*.safetensors"))).items()}
    model.load_state_dict({k: v for k, v in weights.items() if not k.endswith("position_ids")}, strict=False)
    with torch.no_grad():
        states = [model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0] for text in texts]
    return np.stack([state.mean(0).numpy() for state in states])
