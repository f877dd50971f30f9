"""A checkpoint without a tokenizer serves token ids: the same ids as with one, and refuses whatever needs text."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from serving import LLM, RequestError, SamplingParams
from serving.boot.text_side import load_text_side
from tests.tiny_checkpoint import write_tiny_checkpoint

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """(LLM of a checkpoint without a tokenizer, what one with it gives)."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("bare") / "model")
    settings = {
        "max_num_seqs": 1,
        "max_num_batched_tokens": 32,
        "max_model_len": 64,
        "progress": False,
        "dtype": "float32",
    }
    cache = str(folder.parent / "programs")
    greedy = SamplingParams(temperature=0, max_tokens=6)
    with LLM(str(folder), compile_cache=cache, **settings) as llm:
        wanted = llm.generate([PROMPT], greedy, use_tqdm=False)[0].outputs[0].token_ids
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with LLM(str(folder), compile_cache=cache, **settings) as llm:
        yield llm, wanted


def test_ids_in_ids_out(bare):
    llm, wanted = bare
    found = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)[0].outputs[0]
    assert found.token_ids == wanted and found.text == ""
    assert not llm.get_tokenizer().reads_text


@pytest.mark.parametrize(
    "ask,words",
    [
        (lambda llm: llm.generate("text", use_tqdm=False), "started without a tokenizer: send token ids"),
        (lambda llm: llm.generate([PROMPT], SamplingParams(stop=["x"]), use_tqdm=False), "stop acts on text"),
        (lambda llm: llm.generate([PROMPT], SamplingParams(bad_words=["x"]), use_tqdm=False), "bad_words acts on text"),
        (lambda llm: llm.chat([{"role": "user", "content": "x"}], use_tqdm=False), "no chat template"),
    ],
)
def test_what_needs_text_is_refused(bare, ask, words):
    with pytest.raises(RequestError, match=words):
        ask(bare[0])


@pytest.mark.parametrize("kind", [None, "none", "no_vocab"])
def test_a_gguf_file_that_says_it_has_no_vocabulary(kind, monkeypatch):
    """As llama.cpp's converter writes models that are given ids."""
    metadata = {"tokenizer.ggml.eos_token_id": 7} | ({} if kind is None else {"tokenizer.ggml.model": kind})
    monkeypatch.setattr("models.loading.gguf.file.open_gguf", lambda path: SimpleNamespace(metadata=metadata))
    side = load_text_side(SimpleNamespace(kind="gguf", path=None))  # type: ignore[arg-type]
    assert not side.tokenizer.reads_text and side.tokenizer.eos_token_ids == (7,) and side.chat_template is None
