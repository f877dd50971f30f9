"""Decoders that tell labels, against transformers' own: tiny random ones."""

from __future__ import annotations

import json

import numpy as np
import pytest

from models.label_head import LabelHead
from models.loading.answers import words_of
from models.loading.load import load_model, resolve
from models.registry import families, find
from serving.engine.device.programs.compiling import ProgramCache, starting
from serving.engine.encoder.runner import EncoderBuckets, EncoderRunner, Text

TEXTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [3]]
TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
CASES = {
    "LlamaForSequenceClassification": ("LlamaConfig", {}),
    "Qwen3ForSequenceClassification": ("Qwen3Config", {"num_labels": 1}),
    "MistralForSequenceClassification": ("MistralConfig", {"sliding_window": 4}),
    "Gemma2ForSequenceClassification": ("Gemma2Config", {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "Qwen3MoeForSequenceClassification": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "GPT2ForSequenceClassification": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}


def reference_model(architecture, folder, **fields):
    import torch
    import transformers

    kind, own = CASES[architecture]
    plain = TINY if kind != "GPT2Config" else {k: v for k, v in TINY.items() if "token_id" in k or k == "vocab_size"}
    torch.manual_seed(0)
    reference = getattr(transformers, architecture)(getattr(transformers, kind)(**plain | own | fields)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    reference.save_pretrained(folder)
    return reference


def logits_of(reference, text):
    import torch

    with torch.no_grad():
        return reference(torch.tensor([text])).logits[0].numpy()


@pytest.mark.parametrize("architecture", CASES)
def test_logits(architecture, tmp_path):
    reference = reference_model(architecture, tmp_path)
    loaded = load_model(resolve(str(tmp_path)), progress=False)
    head = LabelHead.of(loaded.config)
    assert len(head.labels) == (1 if architecture.startswith("Qwen3F") else 2)
    assert loaded.config.architecture == architecture
    length = np.array([len(text) for text in TEXTS] + [0], np.int32)
    tokens = np.zeros((len(length), 14), np.int32)
    for row, text in enumerate(TEXTS):
        tokens[row, : len(text)] = text
    logits = np.asarray(loaded.model.classify(loaded.model.encode(tokens, length), length))
    for row, text in enumerate(TEXTS):
        wanted = logits_of(reference, text)
        np.testing.assert_allclose(logits[row], wanted, atol=1e-4 * max(1.0, np.abs(wanted).max()))


def test_batches_of_an_engine(tmp_path):
    """Of another length each, in company and alone: the padding behind a text changes nothing."""
    reference = reference_model("LlamaForSequenceClassification", tmp_path, id2label={0: "bad", 1: "so-so", 2: "good"})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"problem_type": "multi_label_classification"}))
    loaded = load_model(resolve(str(tmp_path)), progress=False)
    head = LabelHead.of(loaded.config)
    assert head.labels == ("bad", "so-so", "good") and head.activation == "sigmoid"
    with starting():
        runner = EncoderRunner(loaded.model, EncoderBuckets.make(16, 4, 64), ProgramCache(None, ""), classifies=True)
        runner.compile()
    wanted = np.stack([logits_of(reference, text) for text in TEXTS])
    np.testing.assert_allclose(runner.run([Text(text) for text in TEXTS]), wanted, atol=1e-4)
    np.testing.assert_allclose(runner.run([Text(TEXTS[1])])[0], wanted[1], atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_that_answers_is_a_reranker(tied, tmp_path):
    """Its score is the logit of "yes" less that of "no" behind the last token."""
    import torch
    import transformers

    folder = tmp_path / "Qwen3-Reranker-0.6B"
    torch.manual_seed(0)
    reference = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TINY | {"tie_word_embeddings": tied})).eval()
    reference.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"answers with the tokens 'no' and 'yes', and tokenizer.json has no 'no'"):
        load_model(resolve(str(folder)), progress=False)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"no": 40, "yes": 41}}}))
    loaded = load_model(resolve(str(folder)), progress=False)
    head = LabelHead.of(loaded.config)
    assert head.scores and head.labels == ("yes",) and head.activation == "sigmoid"
    length = np.array([len(text) for text in TEXTS], np.int32)
    tokens = np.zeros((len(length), 14), np.int32)
    for row, text in enumerate(TEXTS):
        tokens[row, : len(text)] = text
    logits = np.asarray(loaded.model.classify(loaded.model.encode(tokens, length), length))
    for row, text in enumerate(TEXTS):
        wanted = logits_of(reference, text)[-1]
        np.testing.assert_allclose(logits[row], [wanted[41] - wanted[40]], atol=1e-4)


def test_which_decoders_answer():
    plain = {"architectures": ["Qwen3ForCausalLM"]}
    assert words_of(plain, "Qwen/Qwen3-Reranker-8B") == ("no", "yes")
    assert words_of(plain, "Qwen/Qwen3-8B") is None
    assert words_of({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3-Reranker-0.6B-seq-cls") is None
    told = {"architectures": ["LlamaForCausalLM"], "classifier_from_token": ["false", "true"]}
    assert words_of(told, "mine") == ("false", "true")
    with pytest.raises(ValueError, match="classifier_from_token is 'yes'; give two tokens"):
        words_of(plain | {"classifier_from_token": "yes"}, "mine")


def test_every_one_is_transformers_own_name():
    import transformers

    ours = {
        name for family in families() for name in family.architectures if name.endswith("ForSequenceClassification")
    }
    assert ours > set(CASES) and all(hasattr(transformers, name) for name in ours)
    assert find("Gemma3TextForSequenceClassification").tasks == ("classify", "score")
