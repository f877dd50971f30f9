"""Cross-encoders served: `python -m serving.launch` and HTTP against transformers' logits of the same pairs."""

from __future__ import annotations

import json
import pathlib
import urllib.error

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from tests.e2e.test_embeddings import ask
from tests.e2e.test_server import process

WORDS = (
    "a", "the", "cat", "dog", "sat", "on", "mat", "stock", "market", "fell", "by", "percent", "who", "what", "does", "eat",
    "rain", "river", "bank",
)  # fmt: skip
QUERY = "who sat on the mat"
DOCUMENTS = [
    "the cat sat on the mat",
    "a dog",
    "the stock market fell by a percent",
    "what does the river bank eat " * 12,
    "rain unknownword",
]
IDENTITY = {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}
MODELS = {
    "Bert": (["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "[CLS] $A [SEP] $B:1 [SEP]:1", {}),
    "XLMRoberta": (["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s> </s> $B </s>", {"type_vocab_size": 1}),
}


def make_checkpoint(folder: pathlib.Path, kind: str, activation: str):
    """A random reranker and a tokenizer of whole words; (transformers' model, the tokenizer)."""
    import torch
    import transformers

    special, template, more = MODELS[kind]
    vocabulary = {token: i for i, token in enumerate([*special, *WORDS])}
    unknown = "[UNK]" if kind == "Bert" else "<unk>"
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.add_special_tokens(special)
    ends = [(token, vocabulary[token]) for token in special if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=template.split(" $B")[0].removesuffix(" </s>"), pair=template, special_tokens=ends
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=128,
        num_labels=1,
        pad_token_id=vocabulary[special[0 if kind == "Bert" else 1]],
        **more,
    )
    reference = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    reference.save_pretrained(folder)
    if activation == "identity":
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | IDENTITY))
    return reference, tokenizer


@pytest.mark.parametrize(("kind", "activation"), [("Bert", "sigmoid"), ("XLMRoberta", "identity")])
def test_scores_over_http_are_transformers(kind, activation, tmp_path):
    import torch

    folder = tmp_path / "tiny-reranker"
    folder.mkdir()
    reference, tokenizer = make_checkpoint(folder, kind, activation)
    wanted = []
    for text in DOCUMENTS:
        encoded = tokenizer.encode(QUERY, text)
        given = {"input_ids": torch.tensor([encoded.ids])}
        if kind == "Bert":
            given["token_type_ids"] = torch.tensor([encoded.type_ids])
        with torch.no_grad():
            logit = reference(**given).logits[0, 0]
        wanted.append(float(torch.sigmoid(logit) if activation == "sigmoid" else logit))
    assert np.ptp(wanted) > 0.05, "documents that score alike would hide mistakes"

    with process("--model", str(folder), "--port", "0", "--no-progress") as (_, read_to):
        url = read_to(r"ready at .*(http://\S+)")[1]
        for path in ("/score", "/v1/score"):
            reply = ask(url, path, {"text_1": QUERY, "text_2": DOCUMENTS})
            assert [entry["score"] for entry in reply["data"]] == pytest.approx(wanted, abs=1e-4)
        alone = [ask(url, "/score", {"text_1": QUERY, "text_2": text})["data"][0]["score"] for text in DOCUMENTS]
        assert alone == pytest.approx(wanted, abs=1e-4)  # whoever shares their batch
        best = sorted(range(len(wanted)), key=lambda i: -wanted[i])
        for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
            results = ask(url, path, {"query": QUERY, "documents": DOCUMENTS})["results"]
            assert [entry["index"] for entry in results] == best
            assert [entry["relevance_score"] for entry in results] == pytest.approx([wanted[i] for i in best], abs=1e-4)
            assert results[0]["document"]["text"] == DOCUMENTS[best[0]]
        assert len(ask(url, "/rerank", {"query": QUERY, "documents": DOCUMENTS, "top_n": 2})["results"]) == 2
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(url, "/v1/embeddings", {"input": QUERY})
        assert refused.value.code == 501
