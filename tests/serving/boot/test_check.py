"""What can be refused is refused before a weight is read, with the setting's name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from serving.boot import load
from serving.boot.startup import start
from serving.engine.api.config import EngineConfig
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("check") / "model")


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(checkpoint, tmp_path / "model")


@pytest.fixture(autouse=True)
def unread(monkeypatch):
    """Weights are never asked for."""

    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(load, "load_model", read)


def refused(checkpoint, **settings):
    """The sentence that a start ends with."""
    with pytest.raises(ValueError) as caught:
        start(EngineConfig(**{"model": str(checkpoint), "compile_cache": "", "progress": False, **settings}))
    return str(caught.value)


@pytest.mark.parametrize(
    "settings,sentence",
    [
        ({"attention_backend": "flash"}, "attention_backend must be one of native, pallas_tpu, pallas_gpu, xla; got 'flash'."),
        ({"attention_backend": "pallas_tpu"}, "attention_backend pallas_tpu does not run here"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "with max_num_seqs 64 it must be at least 80"),
        ({"max_model_len": 1024}, "max_model_len is 1024, but the model was made for 256 positions"),
        ({"kv_cache_memory": "64KiB", "max_model_len": 256}, "the KV cache may take 64 KiB, which holds"),
        ({"kv_cache_memory": 1, "page_size": 16}, "one sequence of 32 tokens needs"),
        ({"mesh": "data=3"}, "needs 3 devices"),
        ({"compiled": "nowhere"}, "no bundle of programs"),
        ({"chat_template": "nowhere.jinja"}, "chat_template nowhere.jinja: cannot be read as a file"),
        ({"chat_template": "{% for %}"}, "The chat template is not valid"),
        ({"tokenizer": "nowhere"}, "nowhere"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)  # fmt: skip
def test_flags_and_headers(checkpoint, settings, sentence):
    assert sentence in refused(checkpoint, **settings)


@pytest.mark.parametrize(
    "name,text",
    [("tokenizer.json", "{"), ("tokenizer.json", None), ("tokenizer_config.json", "[]"), ("config.json", "{")],
)
def test_spoiled_files(copied, name, text):
    if text is None:
        (copied / "tokenizer_config.json").write_text("{}")
        (copied / name).unlink()
    else:
        (copied / name).write_text(text)
    assert name in refused(copied)


def test_a_template_that_does_not_compile(copied):
    (copied / "chat_template.jinja").write_text("{% if %}")
    assert "The chat template is not valid" in refused(copied)


def test_an_activation_or_architecture_that_is_not_known(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    assert "NoSuchModel" in refused(copied)


def test_a_draft_that_cannot_guess(checkpoint, copied):
    """Another vocabulary by a single token, another size of it, too few positions, no such model."""

    def drafted(**more) -> str:
        return refused(checkpoint, speculative_config={"method": "draft_model", "model": str(copied)}, **more)

    words = (copied / "tokenizer.json").read_text()
    (copied / "tokenizer.json").write_text(words.replace('"w7": 7', '"v7": 7').replace('"w7":7', '"v7":7'))
    assert "has another vocabulary than model: 2 tokens differ; 'v7' is 7 there and missing here" in drafted()
    (copied / "tokenizer.json").write_text(words)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    assert "was made for 64 positions, sequences here may have 256. Lower max_model_len to 64" in drafted()
    assert "weights were read" in _read(lambda: drafted(max_model_len=64))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    (copied / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    assert "has a vocabulary of 300 tokens, model one of 256." in drafted()
    for name, sentence in (
        ("nowhere", "there is no such file or directory"),
        ("n" * 5000, "no file has so long a name"),
        ("no\0where", "there is no such file or directory"),
        (str(copied / "config.json"), "the file is not a GGUF file"),
        (str(copied.parent), "the directory has neither config.json nor a GGUF file"),
    ):
        for method in ("draft_model", "eagle3"):
            said = refused(checkpoint, speculative_config={"method": method, "model": name})
            assert said.startswith(f"speculative_config: model {name[:40]}") and sentence in said


def test_more_drafts_than_a_step_verifies(checkpoint):
    sizes = {"max_num_seqs": 1, "max_num_batched_tokens": 32}
    said = refused(checkpoint, speculative_config={"method": "ngram", "num_speculative_tokens": 32}, **sizes)
    assert said == "num_speculative_tokens is 32; a step of 32 tokens verifies 31 at most."


def test_a_head_that_is_not_there_or_is_anothers(checkpoint, tmp_path):
    def headed(**more) -> str:
        return refused(checkpoint, speculative_config={"method": "eagle3", "model": str(tmp_path)}, **more)

    assert "is of a family without heads" in refused(checkpoint, speculative_config={"method": "mtp"})
    several = refused(checkpoint, speculative_config={"method": "mtp"}, num_scheduler_steps=2)
    assert "hears every step; set num_scheduler_steps, 2 here, to 1" in several
    config = {
        "architectures": ["LlamaForCausalLMEagle3"], "hidden_size": 48, "num_attention_heads": 3, "vocab_size": 256,
        "intermediate_size": 96, "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
    }  # fmt: skip
    tensors = {"midlayer.self_attn.q_proj.weight": np.zeros((48, 96), np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    for changed, sentence in (
        ({"architectures": ["LlamaForCausalLM"]}, "is no EAGLE-3 head: its architectures are ['LlamaForCausalLM']"),
        ({"speculators_model_type": "dflash"}, "is of the kind 'dflash'"),
        ({"target_hidden_size": 64}, "the head is for hidden states of 64, the model's are 48 wide"),
        ({"hidden_size": 96}, "the head is for hidden states of 96, the model's are 48 wide"),
        ({"vocab_size": 300}, "the head is for a vocabulary of 300 tokens, the model has 256"),
        ({"num_hidden_layers": 2}, "the head has 2 layers"),
        ({"draft_vocab_size": 32}, "no d2t"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 7]}, "hears the layers [0, 1, 7] of a model of 2"),
        ({"eagle_aux_hidden_state_layer_ids": 5}, "hears the layers 5 of a model of 2"),
        ({"eagle_aux_hidden_state_layer_ids": [[0], 1, 2]}, "hears the layers [[0], 1, 2] of a model of 2"),
        ({"target_hidden_size": "48"}, "target_hidden_size = '48'; it must be a whole number from 1"),
        ({"draft_vocab_size": [256]}, "draft_vocab_size = [256]; it must be a whole number from 1"),
        ({"draft_vocab_size": 1 << 40}, "rows of logits for a vocabulary of 256"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings = 'many'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"eagle_config": [1]}, "eagle_config = [1]; it must be an object"),
        ({"transformer_layer_config": "x"}, "transformer_layer_config = 'x'; it must be an object"),
        ({"architectures": 5}, "is no EAGLE-3 head"),
        ({}, "the checkpoint has no tensor"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        assert sentence in headed(), changed
    as_model = refused(checkpoint, speculative_config={"model": str(tmp_path)})
    assert 'is a head and no model of its own; say "method": "eagle3"' in as_model


def _read(start) -> str:
    """That a start goes as far as the weights."""
    with pytest.raises(AssertionError) as caught:
        start()
    return str(caught.value)
