"""LLM on the default model, in this process."""

import json
import pathlib
import time

import pytest

from serving import LLM, SamplingParams, StructuredOutputs

pytestmark = pytest.mark.real_model

GREEDY = SamplingParams(temperature=0, max_tokens=16)


@pytest.fixture(scope="module")
def llm():
    with LLM(dtype="float32", max_model_len=512, max_num_seqs=4, max_num_batched_tokens=64, progress=False) as llm:
        yield llm


def test_generate_and_chat(llm):
    (out,) = llm.chat([{"role": "user", "content": "What is the capital of France?"}], GREEDY, use_tqdm=False)
    assert "Paris" in out.outputs[0].text and out.outputs[0].finish_reason == "stop"
    (again,) = llm.generate([out.prompt_token_ids], GREEDY, use_tqdm=False)
    assert again.outputs[0].token_ids == out.outputs[0].token_ids


def test_logprobs_of_greedy_tokens_are_the_best(llm):
    (out,) = llm.generate("The sea is", SamplingParams(temperature=0, max_tokens=6, logprobs=3), use_tqdm=False)
    choice = out.outputs[0]
    for token, entries in zip(choice.token_ids, choice.logprobs, strict=True):
        assert entries[token].rank == 1 and entries[token].logprob == max(e.logprob for e in entries.values())
    assert "".join(e[t].decoded_token for t, e in zip(choice.token_ids, choice.logprobs, strict=True)) == choice.text


def test_structured_outputs(llm):
    params = SamplingParams(temperature=1, seed=3, max_tokens=8, structured_outputs=StructuredOutputs(regex="[0-9]{4}"))
    for out in llm.generate(["A year:"] * 3, params, use_tqdm=False):
        assert len(out.outputs[0].text) == 4 and out.outputs[0].text.isdigit()


def test_no_compilation_after_start_and_no_page_lost(llm):
    for _ in range(200):  # the last step's pages come back when that step has retired
        stats = llm.stats()
        if stats.num_pages_free == stats.num_pages_total:
            break
        time.sleep(0.02)
    assert stats.num_recompilations == 0
    assert (stats.num_running, stats.num_waiting, stats.num_pages_free) == (0, 0, stats.num_pages_total)


def test_the_notebook_in_examples(llm, monkeypatch, capsys):
    """Its cells run, on the model that is here already; and what is committed was executed without an error."""
    notebook = json.loads((pathlib.Path(__file__).parents[2] / "examples" / "quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]
    monkeypatch.setattr("serving.llm.LLM", lambda **kwargs: llm)
    monkeypatch.setattr(llm, "shutdown", lambda: None)
    names = {}
    for cell in cells:
        exec("".join(cell["source"]), names)  # noqa: S102 - our own notebook
    assert "Paris" in capsys.readouterr().out
