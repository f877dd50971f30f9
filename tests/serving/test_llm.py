"""LLM over a mock engine: result shapes, orders, interruption, notebooks."""

import asyncio
import dataclasses
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from serving import LLM, RequestError, SamplingParams
from serving.boot.startup import Started, TextSide
from tests.mock_engine import EOS, MockEngine, MockTemplate, MockTokenizer


class Engine:
    def __init__(self, client: MockEngine) -> None:
        self.client = client
        self.shutdowns = 0

    def shutdown(self) -> None:
        self.shutdowns += 1


def make(reply=None, defaults=None, **kwargs) -> Any:
    engine: Any = Engine(MockEngine(reply, **kwargs))
    tokenizer: Any = MockTokenizer()
    template: Any = MockTemplate()
    return LLM.from_started(Started(engine, TextSide(tokenizer, template), defaults or {}))


def mock(llm) -> MockEngine:
    return llm._started.engine.client


def test_vllms_result_shape():
    with make("Hello!") as llm:
        (out,) = llm.generate("hi", SamplingParams(max_tokens=32, logprobs=1))
    assert (out.prompt, out.prompt_token_ids, out.finished) == ("hi", [256, 104, 105], True)
    (choice,) = out.outputs
    assert (choice.index, choice.text, choice.finish_reason, choice.stop_reason) == (0, "Hello!", "stop", None)
    assert choice.token_ids == [*b"Hello!", EOS]
    assert len(choice.logprobs) == 7
    assert choice.logprobs[0][ord("H")].logprob == -0.5 and choice.logprobs[0][ord("H")].decoded_token == "H"
    assert choice.cumulative_logprob == pytest.approx(-3.5)


def test_prompts_in_every_form():
    with make("x") as llm:
        texts = llm.generate(["a", "b"], use_tqdm=False)
        ids = llm.generate([[1, 2], [3]], use_tqdm=False)
        mapped = llm.generate([{"prompt_token_ids": [4]}, {"prompt": "c"}], use_tqdm=False)
        one = llm.generate([5, 6], use_tqdm=False)
        mixed = llm.generate({"prompt_token_ids": [7]}, use_tqdm=False)
        assert llm.generate([], use_tqdm=False) == []
    assert [o.prompt for o in texts] == ["a", "b"]
    assert [o.prompt_token_ids for o in ids] == [[1, 2], [3]]
    assert [o.prompt_token_ids for o in mapped] == [[4], [256, 99]]
    assert [o.prompt_token_ids for o in one + mixed] == [[5, 6], [7]]


def test_results_keep_the_order_of_the_prompts_and_their_own_parameters():
    def reply(request):
        return [ord("x")] * 100

    with make(reply, step_s=0.001) as llm:
        params = [SamplingParams(max_tokens=1 + (7 * i) % 50) for i in range(200)]
        outs = llm.generate([f"{i}" for i in range(200)], params, use_tqdm=False)
    assert [o.prompt for o in outs] == [f"{i}" for i in range(200)]
    assert [len(o.outputs[0].token_ids) for o in outs] == [p.max_tokens for p in params]


def test_many_prompts_run_together_but_not_without_bound():
    peak = 0

    def reply(request):
        nonlocal peak
        peak = max(peak, len(client.live))
        return b"ab"

    with make(reply) as llm:
        client = mock(llm)
        llm.generate(["x"] * 2000, SamplingParams(max_tokens=3), use_tqdm=False)
    assert 64 <= peak <= 256


def test_n_completions():
    with make(lambda r: str(r.params.seed % 1000).encode()) as llm:
        (out,) = llm.generate("x", SamplingParams(n=3, seed=11), use_tqdm=False)
    assert [c.index for c in out.outputs] == [0, 1, 2] and len({c.text for c in out.outputs}) == 3


def test_chat_takes_one_conversation_or_several():
    turn = {"role": "user", "content": "hi"}
    with make("yes") as llm:
        (one,) = llm.chat([turn], use_tqdm=False)
        two = llm.chat([[turn], [{"role": "system", "content": "s"}, turn]], use_tqdm=False)
        (open_,) = llm.chat([turn, {"role": "assistant", "content": "so"}], use_tqdm=False, continue_final_message=True)
    assert one.prompt == "<|user|>hi<|end|><|assistant|>" and one.outputs[0].text == "yes"
    assert two[1].prompt == "<|system|>s<|end|><|user|>hi<|end|><|assistant|>"
    assert open_.prompt.endswith("<|assistant|>so")


def test_without_parameters_the_models_defaults_hold():
    with make("y" * 50, {"temperature": 0.5, "top_k": 9}) as llm:
        (out,) = llm.generate("x", use_tqdm=False)
        assert len(out.outputs[0].token_ids) == 16
        params = mock(llm).requests[0].params
    assert (params.temperature, params.top_k) == (0.5, 9)


def test_a_bad_prompt_is_refused_before_anything_runs():
    with make("y") as llm:
        with pytest.raises(RequestError, match="empty"):
            llm.generate(["good", ""], use_tqdm=False)
        with pytest.raises(RequestError, match="0 to 263"):
            llm.generate([[1], [10**6]], use_tqdm=False)
        with pytest.raises(ValueError, match="2 entries for 1 prompts"):
            llm.generate("x", [SamplingParams()] * 2)
        assert not mock(llm).requests
        assert llm.generate("x", use_tqdm=False)[0].finished


def test_the_bar_counts_prompts(capsys):
    with make("y") as llm:
        llm.generate(["a", "b", "c"])
        assert "3/3" in capsys.readouterr().err
        llm.generate(["a"], use_tqdm=False)
        assert capsys.readouterr().err == ""


async def test_inside_a_running_event_loop_as_in_a_notebook():
    asyncio.get_running_loop()
    with make("z") as llm:
        assert llm.generate("x", use_tqdm=False)[0].outputs[0].text == "z"


def test_calls_from_several_threads():
    with make() as llm:
        results = {}
        work = [
            threading.Thread(target=lambda i=i: results.update({i: llm.generate(f"{i}", use_tqdm=False)}))
            for i in range(8)
        ]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
    assert {i: out[0].prompt for i, out in results.items()} == {i: f"{i}" for i in range(8)}


def test_ctrl_c_ends_the_requests_and_not_the_model():
    with make("word ", step_s=0.002, max_model_len=100_000) as llm:

        def interrupt():
            while not mock(llm).live:
                time.sleep(0.002)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["x"] * 5, SamplingParams(ignore_eos=True, max_tokens=90_000), use_tqdm=False)
        assert not mock(llm).live
        assert llm.generate("x", SamplingParams(max_tokens=2), use_tqdm=False)[0].outputs[0].text == "wo"


def test_embeddings_in_order():
    async def embed(request_id, token_ids, *, pooling=None, priority=0):
        await asyncio.sleep(0.01 / len(token_ids))
        return np.array([len(token_ids), pooling == "mean"], np.float32)

    with make() as llm:
        with pytest.raises(RequestError, match="does not give embeddings"):
            llm.embed("x", use_tqdm=False)
        mock(llm).embedder = SimpleNamespace(embed=embed)
        outs = llm.embed(["a", "bcd", [1, 2]], pooling="mean", use_tqdm=False)
        with pytest.raises(RequestError, match="512 tokens"):
            llm.embed([[1] * 513], use_tqdm=False)
        assert len(llm.embed([[1] * 512], use_tqdm=False)) == 1, "a prompt that is only read may fill the context"
    assert [o.outputs.embedding for o in outs] == [[2.0, 1.0], [4.0, 1.0], [2.0, 1.0]]
    assert outs[2].prompt_token_ids == [1, 2]


def test_labels_in_order():
    async def classify(request_id, token_ids, *, raw=False, priority=0):
        await asyncio.sleep(0.01 / len(token_ids))
        return np.array([len(token_ids), raw], np.float32)

    with make() as llm:
        with pytest.raises(RequestError, match="no sequence classifier"):
            llm.classify("x", use_tqdm=False)
        mock(llm).classifier = SimpleNamespace(classify=classify)
        llm._service.info = dataclasses.replace(llm.info, tasks=("classify",))
        outs = llm.classify(["a", "bcd", [1, 2]], use_tqdm=False)
    assert [o.outputs.probs for o in outs] == [[2.0, 0.0], [4.0, 0.0], [2.0, 0.0]]
    assert outs[2].prompt_token_ids == [1, 2] and outs[0].outputs.num_classes == 2


def test_shut_down_once():
    llm = make("x")
    engine = llm._started.engine
    llm.shutdown()
    llm.shutdown()
    assert engine.shutdowns == 1
    with pytest.raises(RuntimeError, match="shut down"):
        llm.generate("x")


def test_a_forgotten_model_is_shut_down():
    llm = make("x")
    engine = llm._started.engine
    llm.generate("x", use_tqdm=False)
    del llm
    import gc

    gc.collect()
    assert engine.shutdowns == 1


def test_wrong_options_are_explained():
    with pytest.raises(TypeError, match="Did you mean max_num_seqs"):
        LLM(max_num_seq=3)
    with pytest.raises(ValueError, match="dtype must be one of"):
        LLM(dtype="float8")


def test_importing_the_package_is_light():
    code = (
        "import sys, serving; from serving import SamplingParams; "
        "heavy = {'jax', 'grpc', 'fastapi', 'tokenizers', 'flax'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_names_of_the_package():
    import serving

    for name in serving.__all__:
        assert getattr(serving, name) is not None and name in dir(serving)
    with pytest.raises(AttributeError):
        serving.Nothing  # noqa: B018


TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
CALL = '<think>Easy.</think>Here: <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def test_a_chats_message_has_calls_and_thinking_told_apart():
    engine: Any = Engine(MockEngine(CALL))
    tokenizer: Any = MockTokenizer()
    template: Any = MockTemplate()
    template.source = "<tool_call> <think>"
    chat = [{"role": "user", "content": "1?"}]
    with LLM.from_started(Started(engine, TextSide(tokenizer, template), {"max_tokens": 200})) as llm:
        params = SamplingParams(max_tokens=200)
        (out,) = llm.chat(chat, params, tools=[TOOL], use_tqdm=False)
        message = out.outputs[0].message
        assert out.outputs[0].text == CALL
        assert (message["role"], message["content"], message["reasoning"]) == ("assistant", "Here:", "Easy.")
        assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
        answer = {"role": "tool", "content": "2", "tool_call_id": message["tool_calls"][0]["id"]}
        llm.chat([*chat, message, answer], params, tools=[TOOL], use_tqdm=False)  # it is the next turn as it is
        (out,) = llm.chat(chat, params, tools=[TOOL], tool_choice="none", use_tqdm=False)
        assert "tool_calls" not in out.outputs[0].message
        (out,) = llm.generate("1?", params, use_tqdm=False)
        assert out.outputs[0].message is None
        with pytest.raises(RequestError, match="not among the tools"):
            named = {"type": "function", "function": {"name": "sub"}}
            llm.chat(chat, params, tools=[TOOL], tool_choice=named, use_tqdm=False)
