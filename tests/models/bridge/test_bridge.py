"""Architectures without a family here, by transformers' own code: what is computed, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models import registry
from models.bridge import check, family
from models.bridge.graph import Length, Node, Ref, Refused, Trace, run
from models.loading.load import load_model
from models.loading.source import resolve
from tests.models.bridge import tiny
from tests.models.bridge.sweep import tried
from tests.models.paged import PagedModel

ROOT = Path(__file__).parents[3]

# Scores written out, with windows in tables of its own; scores with slopes, and positions that the model counts itself; a mixture
# beside a shared expert; windows and every fourth layer without positions; latent attention, taken apart.
CASES = {
    "gpt_neo": "GPTNeoForCausalLM",
    "mpt": "MptForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "afmoe": "AfmoeForCausalLM",
    "minicpm3": "MiniCPM3ForCausalLM",
}


@pytest.mark.parametrize("kind", CASES)
def test_tokens_and_logits_are_transformers(kind):
    found = tried(kind, CASES[kind])
    assert found["result"] == "equal", found
    assert found["error"] < 1e-4


@pytest.mark.parametrize(
    ("hf", "why"),
    [
        (
            {"model_type": "bert", "architectures": ["BertLMHeadModel"], "hidden_size": 64, "num_attention_heads": 4},
            "looks at later positions",
        ),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"], "hidden_size": 64}, "no heads of attention"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "no model for text generation"),
        ({"model_type": "nobodys", "architectures": ["LlamaForCausalLM"]}, "no configuration of the type 'nobodys'"),
    ],
)
def test_what_cannot_be_served_over_pages_is_refused_in_a_sentence(hf, why):
    from models.bridge.tracing import trace

    with pytest.raises(Refused, match=why):
        trace(hf | {"num_hidden_layers": 1, "vocab_size": 384})


def test_layers_of_different_heads_are_refused_in_a_sentence():
    from models.bridge.tracing import _facts

    class Differing:
        """As transformers' configurations with a `per_layer_config` answer."""

        def get_text_config(self):
            return self

        @property
        def num_attention_heads(self):
            raise RuntimeError("'num_attention_heads' is a per-layer attribute")

    with pytest.raises(Refused, match="its layers have different numbers of heads"):
        _facts(Differing())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(folder of a checkpoint, where traces are kept meanwhile, what transformers makes of it, it loaded for the first time)."""
    folder, traces = tmp_path_factory.mktemp("helium"), tmp_path_factory.mktemp("traces")
    made = tiny.model("helium", "HeliumForCausalLM")
    made.save_pretrained(folder)
    patch = pytest.MonkeyPatch()
    patch.setattr(family, "folder", lambda: traces)
    expected = tiny.expected(made, prompts=(21, 7), new=4)
    yield folder, traces, expected, load_model(resolve(str(folder)), progress=False)
    patch.undo()


def test_a_checkpoint_is_traced_compared_and_served(checkpoint):
    """By other processes: nothing of torch is needed here."""
    _, traces, expected, loaded = checkpoint
    assert {path.suffix for path in traces.iterdir()} == {".trace", ".compared"}
    prompts = [tokens[:-4] for tokens, _ in expected]
    results = PagedModel(loaded.model, max_len=96).generate(prompts, 4)
    assert [tokens for tokens, _ in results] == [tokens for tokens, _ in expected]


def test_a_warm_start_imports_neither_torch_nor_transformers(checkpoint):
    folder, traces, *_ = checkpoint
    code = (
        "import pathlib, sys; from models.bridge import family; from models.loading.load import load_model; "
        f"from models.loading.source import resolve; family.folder = lambda: pathlib.Path({str(traces)!r}); "
        f"load_model(resolve({str(folder)!r}), progress=False, quantization='int8'); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines()[-1] == "[]"


def test_another_computation_than_transformers_is_refused(checkpoint):
    """What the comparison is for: here the cache holds a trace whose attention is scaled otherwise."""
    folder, traces, *_ = checkpoint
    (kept,) = traces.glob("*.trace")
    right = kept.read_bytes()
    trace = Trace.from_bytes(right)
    for function in trace.functions:
        for attends in function.attends:
            object.__setattr__(attends, "scale", attends.scale * 1.1)
        object.__setattr__(function, "digest", function.digest[::-1])
    kept.write_bytes(trace.to_bytes())
    try:
        with pytest.raises(ValueError, match=r"HeliumForCausalLM has no family here.*logits differ by 0\.\d+ of"):
            load_model(resolve(str(folder)), progress=False)
    finally:
        kept.write_bytes(right)


def test_a_torn_trace_is_made_again(tmp_path):
    (tmp_path / "some.trace").write_bytes(b"PK\x03\x04 torn")
    assert family._kept(tmp_path / "some.trace") is None


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(family, "installed", lambda: False)
    with pytest.raises(ValueError, match="needs torch and transformers: the extra 'transformers'"):
        registry.find("HeliumForCausalLM")
    assert "the extra 'transformers'" in registry.status("HeliumForCausalLM")


def test_a_name_that_transformers_does_not_have_is_refused_at_once():
    with pytest.raises(ValueError, match="'NobodysForCausalLM' is not supported"):
        registry.find("NobodysForCausalLM")


def test_numbers_that_depend_on_the_length():
    nodes = (Node("take", (Ref(0), Length(2, -1)), (), (1,)),)
    function = _function(nodes)
    found = run(function, [10], lambda node, table: (table[0] + node.args[1].slope * 5 + node.args[1].offset,))
    assert found == [19]


def _function(nodes):
    from models.bridge.graph import Function

    return Function(1, (), (), nodes, (1,), ())


def test_the_comparison_covers_prompts_in_pieces_and_single_steps():
    assert check.PREFILL % 16 and check.TOKENS - check.PREFILL > 4
    assert len(np.unique(check.some_tokens(50_000))) > 40
