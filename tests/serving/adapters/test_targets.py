"""What adapters may change: embeddings, tied and untied heads, packed weights; and what a request asks for besides tokens."""

from __future__ import annotations

import gc
import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from models.loading.kept import cache
from serving import LLM, LoRARequest, SamplingParams
from serving.engine.api.sampling_params import StructuredOutputs
from tests.models.adapters.make import write_adapter, write_base
from tests.serving.adapters.conftest import SETTINGS
from tests.serving.adapters.oracle import greedy, logprobs

STEPS = 16
PROMPTS = [[3, 99, 4, 17, 201, 17, 17, 8, 250, 31], [9, 9, 44]]
ADAPTERS = {
    "embedding": {"rank": 3, "targets": (), "embedding": True},
    "head": {"rank": 5, "targets": (), "head": True},
    "both": {"rank": 4, "embedding": True, "head": True},
    "all": {"rank": 8},
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp("targets")
    write_base(made / "base", tied=request.param)
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        write_adapter(made / name, seed=seed, **fields)
    return made


def start(folder, **more):
    return LLM(str(folder / "base"), max_loras=4, **{**SETTINGS, **more})


@pytest.fixture(scope="module")
def llm(folder):
    engine = start(folder)
    yield engine
    engine._started.engine.runner.guard.check()
    engine.shutdown()
    gc.collect()


def ask(llm, folder, names, prompts, params):
    requests = [None if name is None else LoRARequest(name, 1, str(folder / name)) for name in names]
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(given, params, use_tqdm=False, lora_request=requests)


def test_embeddings_and_heads_mixed_with_the_base(llm, folder):
    names = [None, *ADAPTERS]
    expected = {name: greedy(folder, name, PROMPTS, STEPS) for name in names}
    assert len({tuple(expected[name][0]) for name in names}) == 5
    params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)
    for _ in range(2):
        found = ask(llm, folder, names * 2, [prompt for prompt in PROMPTS for _ in names], params)
        for i, output in enumerate(found):
            assert output.outputs[0].token_ids == expected[names[i % 5]][i // 5], names[i % 5]


def test_log_probabilities_of_prompts_and_completions(llm, folder):
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=0)
    names = [None, *ADAPTERS]
    for name, output in zip(names, ask(llm, folder, names, [PROMPTS[0]] * 5, params), strict=True):
        tokens = PROMPTS[0] + output.outputs[0].token_ids
        wanted = logprobs(folder, name, tokens)
        entries = [*output.prompt_logprobs, *output.outputs[0].logprobs]
        for position in range(1, len(tokens)):
            found = entries[position][tokens[position]].logprob
            assert found == pytest.approx(wanted[position - 1, tokens[position]], abs=1e-4), (name, position)


def bytes_alone() -> tokenizers.Tokenizer:
    """A tokenizer whose tokens are the 256 bytes."""
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def test_several_completions_and_grammars_with_an_adapter(llm, folder, tmp_path):
    params = SamplingParams(n=3, seed=5, max_tokens=8, ignore_eos=True)
    outputs = [ask(llm, folder, [name], [PROMPTS[1]], params)[0] for name in (None, "all", "all")]
    texts = [[one.token_ids for one in output.outputs] for output in outputs]
    assert texts[1] == texts[2] != texts[0] and len({tuple(one) for one in texts[1]}) == 3
    spells = write_adapter(
        tmp_path / "spells", seed=9
    )  # its tokens are bytes: what is held to a grammar is its own text
    (spells / "tokenizer.json").write_text(bytes_alone().to_str())
    (spells / "tokenizer_config.json").write_text(json.dumps({"eos_token": "Ā"}))
    held = SamplingParams(temperature=0, max_tokens=20, structured_outputs=StructuredOutputs(choice=["maybe", "never"]))
    (output,) = ask(llm, tmp_path, ["spells"], [PROMPTS[0]], held)
    assert output.outputs[0].text in ("maybe", "never") and output.outputs[0].finish_reason == "stop"


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_beside_packed_weights_the_change_is_the_same(llm, folder, quantization):
    """The change is computed from what the layer is given, not from what a kernel makes of that."""
    if folder.name.endswith("1"):
        pytest.skip("one base is enough")
    packed = start(folder, quantization=quantization)
    try:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)

        def scores(engine, name):
            (output,) = ask(engine, folder, [name], [PROMPTS[0]], params)
            pairs = zip(output.prompt_logprobs[1:], PROMPTS[0][1:], strict=True)
            return np.array([entry[token].logprob for entry, token in pairs])

        for name in ("all", "both"):
            change = scores(llm, name) - scores(llm, None)
            found = scores(packed, name) - scores(packed, None)
            assert np.corrcoef(change, found)[0, 1] > 0.95 and np.abs(change).max() > 1
    finally:
        packed.shutdown()
        gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"num_scheduler_steps": 3}, {"quantization": "int8"}], ids=["several steps", "kept"])
def test_several_steps_at_once_and_weights_that_were_kept_say_the_same(folder, tmp_path, monkeypatch, more):
    monkeypatch.setattr(cache.WeightCache.__init__, "__defaults__", (1 << 40, cache.log.info, 0))  # however small
    kept = {"weight_cache": str(tmp_path / "kept")} if "quantization" in more else {}
    params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)
    names, said = [None, *ADAPTERS], []
    for _ in range(2 if kept else 1):  # the second starts from what the first one kept
        with start(folder, **more, **kept) as engine:
            said.append(
                [output.outputs[0].token_ids for output in ask(engine, folder, names, [PROMPTS[0]] * 5, params)]
            )
            engine._started.engine.runner.guard.check()
    assert len(set(map(tuple, said[0]))) == 5
    if kept:
        assert said[0] == said[1] and any((tmp_path / "kept").rglob("*"))
    else:
        assert said[0] == [greedy(folder, name, PROMPTS[:1], STEPS)[0] for name in names]


def test_an_adapters_own_template_and_tokens_are_used_for_it(llm, folder, tmp_path):
    """Also its own end of a turn."""
    speaks = write_adapter(tmp_path / "speaks", seed=9)
    tokenizer = json.loads((folder / "base" / "tokenizer.json").read_text())
    (speaks / "tokenizer.json").write_text(json.dumps(tokenizer))
    (speaks / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w7"}))
    (speaks / "chat_template.jinja").write_text("{% for m in messages %}w5 {{ m.content }} w6{% endfor %}")
    llm.generate(
        ["w3"], SamplingParams(max_tokens=1), use_tqdm=False, lora_request=LoRARequest("speaks", 1, str(speaks))
    )
    voice = llm._service.voice("speaks")
    assert voice.tokenizer.eos_token_ids == (7, 1) and llm._service.voice().tokenizer.eos_token_ids == (1,)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    (chat,) = llm.chat(
        [{"role": "user", "content": "w3 w4"}], params, use_tqdm=False, lora_request=LoRARequest("speaks", 1)
    )
    assert chat.prompt_token_ids == [5, 3, 4, 6]
    more, flags = write_adapter(tmp_path / "more", seed=9), ("single_word", "lstrip", "rstrip", "normalized")
    tokenizer["added_tokens"].append({"id": 300, "content": "<new>", "special": True, **dict.fromkeys(flags, False)})
    (more / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="the served model has rows for 256"):
        ask(llm, tmp_path, ["more"], [[3]], params)
