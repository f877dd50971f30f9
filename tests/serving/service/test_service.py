"""TextService over the mock engine: what the front ends rely on."""

import asyncio
import contextlib
import threading
import time

import numpy as np
import pytest

from serving.engine.api.sampling_params import SamplingParams, StructuredOutputs
from serving.engine.api.types import FinishReason
from serving.errors import ErrorKind, RequestError
from serving.service import GenerateInput, Limits, TextOutput, TextService, Usage, collect
from tests.mock_engine import BOS, END, EOS, MockEngine, MockTokenizer, mock_service, until


async def ask(service, given="prompt", params=None, **fields):
    given = GenerateInput(text=given, **fields) if isinstance(given, str) else given
    prepared = await service.prepare(given, params or SamplingParams(max_tokens=100))
    return await collect(prepared, service.generate(prepared))


async def refused(service, given, params=None, kind=ErrorKind.INVALID_ARGUMENT):
    with pytest.raises(RequestError) as caught:
        await service.prepare(given, params or SamplingParams())
    assert caught.value.kind is kind
    return caught.value


def message(content, role="user", **more):
    return {"role": role, "content": content, **more}


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_output", [1, 2, 3, 7, 100])
async def test_text_does_not_depend_on_how_tokens_arrive(per_output):
    text = "Grüße aus 東京! 🎌 stop here"
    service = mock_service(MockEngine(text, tokens_per_output=per_output))
    result = await ask(service)
    assert (result.outputs[0].text, result.outputs[0].finish_reason) == (text, "stop")
    assert result.outputs[0].token_ids == [*text.encode(), EOS]
    cut = await ask(service, params=SamplingParams(max_tokens=100, stop=["🎌 s", "here"]))
    assert (cut.outputs[0].text, cut.outputs[0].stop_reason) == ("Grüße aus 東京! ", "🎌 s")
    assert bytes(cut.outputs[0].token_ids).decode() == "Grüße aus 東京! 🎌 s", "not a token behind the stop string"


async def test_stop_string_kept_when_asked_for():
    params = SamplingParams(max_tokens=100, stop=["two"], include_stop_str_in_output=True)
    result = await ask(mock_service(MockEngine("one two three")), params=params)
    assert result.outputs[0].text == "one two"


async def test_stop_strings_do_not_count_before_min_tokens():
    params = SamplingParams(max_tokens=100, stop=["a"], min_tokens=5)
    result = await ask(mock_service(MockEngine("aaabcdaxyz")), params=params)
    assert result.outputs[0].text == "aaabcd"


async def test_half_a_stop_string_at_the_end_is_text():
    result = await ask(mock_service(MockEngine("abc")), params=SamplingParams(max_tokens=100, stop=["bcd"]))
    assert (result.outputs[0].text, result.outputs[0].stop_reason) == ("abc", None)


async def test_a_stop_token_ends_without_its_text():
    params = SamplingParams(max_tokens=100, stop_token_ids=[ord("c")])
    service = mock_service(MockEngine("abcdef"))
    result = await ask(service, params=params)
    assert (result.outputs[0].text, result.outputs[0].stop_reason) == ("ab", ord("c"))
    kept = await ask(
        service, params=SamplingParams(max_tokens=9, stop_token_ids=[ord("c")], include_stop_str_in_output=True)
    )
    assert kept.outputs[0].text == "abc"


async def test_cut_in_the_middle_of_a_character():
    result = await ask(mock_service(MockEngine("é" * 5)), params=SamplingParams(max_tokens=3))
    assert (result.outputs[0].text, result.outputs[0].finish_reason) == ("é\ufffd", "length")


async def test_special_tokens_show_only_when_asked_for():
    service = mock_service(MockEngine([104, END + 0, 105]))
    params = SamplingParams(max_tokens=100, ignore_eos=True, skip_special_tokens=False)
    shown = await ask(service, params=SamplingParams(**{**vars(params), "max_tokens": 3}))
    hidden = await ask(service, params=SamplingParams(max_tokens=3, ignore_eos=True))
    assert (shown.outputs[0].text, hidden.outputs[0].text) == ("h<|end|>i", "hi")


async def test_without_detokenizing_there_are_tokens_alone():
    result = await ask(mock_service(MockEngine("abc")), params=SamplingParams(max_tokens=9, detokenize=False))
    assert (result.outputs[0].text, len(result.outputs[0].token_ids)) == ("", 4)


async def test_logprobs_have_one_entry_a_token_and_stop_with_the_text():
    params = SamplingParams(max_tokens=100, stop=["c"], logprobs=2, prompt_logprobs=1)
    result = await ask(mock_service(MockEngine("abcdef", tokens_per_output=6)), "xy", params=params)
    choice = result.outputs[0]
    assert len(choice.logprobs) == len(choice.token_ids) == 3
    assert choice.logprobs[0][ord("a")].decoded_token == "a"
    assert choice.cumulative_logprob == pytest.approx(-1.5)
    assert result.prompt_logprobs[0] is None and len(result.prompt_logprobs) == 3


# -- prompts -----------------------------------------------------------------------------------------------------------


async def test_prompts_in_three_forms():
    service = mock_service()
    text = await service.prepare(GenerateInput(text="hi<|end|>"), SamplingParams())
    assert text.prompt_token_ids == (BOS, 104, 105, END), "control tokens of a whole prompt are control tokens"
    bare = await service.prepare(GenerateInput(text="hi", add_special_tokens=False), SamplingParams())
    assert bare.prompt_token_ids == (104, 105)
    ids = await service.prepare(GenerateInput(token_ids=[5, 6]), SamplingParams())
    assert (ids.prompt, ids.prompt_token_ids) == (None, (5, 6))
    chat = await service.prepare(GenerateInput(messages=[message("hi")]), SamplingParams())
    assert chat.prompt == "<|user|>hi<|end|><|assistant|>"


async def test_truncation_keeps_the_end():
    service = mock_service(MockEngine(max_model_len=10))
    kept = await service.prepare(
        GenerateInput(text="0123456789abcdef", truncate_prompt_tokens=4), SamplingParams(max_tokens=1)
    )
    assert bytes(kept.prompt_token_ids) == b"cdef"
    fits = await service.prepare(
        GenerateInput(text="0123456789abcdef", truncate_prompt_tokens=-1), SamplingParams(max_tokens=3)
    )
    assert bytes(fits.prompt_token_ids) == b"9abcdef"


async def test_max_tokens_is_what_the_context_leaves():
    service = mock_service(MockEngine(max_model_len=10))
    prepared = await service.prepare(GenerateInput(token_ids=[1] * 4), SamplingParams(max_tokens=None))
    assert prepared.children[0].params.max_tokens == 6
    full = await service.prepare(GenerateInput(token_ids=[1] * 9), SamplingParams(max_tokens=None))
    assert full.children[0].params.max_tokens == 1


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (GenerateInput(), "exactly one prompt"),
        (GenerateInput(text="a", token_ids=[1]), "text and token_ids"),
        (GenerateInput(text="half \ud83d"), "surrogate"),
        (GenerateInput(token_ids=[True]), "token 0 is True"),
        (GenerateInput(token_ids=[-1]), "token 0 is -1"),
        (GenerateInput(messages=[]), "messages is empty"),
        (GenerateInput(messages=["hi"]), "messages[0]"),
        (GenerateInput(messages=[message(None)]), "messages[0].content"),
        (GenerateInput(messages=[message(7)]), "messages[0].content"),
        (GenerateInput(messages=[message("\udc00")]), "surrogate"),
        (GenerateInput(messages=[message([{"type": "image_url"}])]), "text only"),
        (GenerateInput(messages=[message([{"type": "text"}])]), "messages[0].content[0]"),
        (GenerateInput(messages=[message("x", role=None)]), "messages[0].role"),
        (GenerateInput(messages=[message("x")] * 5000), "5000 messages"),
        (GenerateInput(text="x", tools=[{}]), "tools need messages"),
        (GenerateInput(messages=[message("x")], chat_template_kwargs={"a": [1]}), "scalars"),  # type: ignore[dict-item]
        (GenerateInput(messages=[message("x")], continue_final_message=True), "exclude each other"),
        (GenerateInput(text="x", priority=2**31), "priority"),
        (GenerateInput(text="x", timeout_s=float("nan")), "timeout"),
        (GenerateInput(text="x", timeout_s=-1), "timeout"),
        (GenerateInput(text="x", truncate_prompt_tokens=-2), "truncate_prompt_tokens"),
    ],
)
async def test_refused(given, word):
    service = mock_service()
    error = await refused(service, given)
    assert word in error.message
    assert not service.client.requests


async def test_without_a_template_messages_are_refused():
    service = TextService(MockEngine(), MockTokenizer(), model_id="mock")  # type: ignore[arg-type]
    assert "no chat template" in (await refused(service, GenerateInput(messages=[message("x")]))).message


async def test_unknown_model_names_the_right_one():
    error = await refused(mock_service(), GenerateInput(text="x", model="nope"), kind=ErrorKind.NOT_FOUND)
    assert "'mock'" in error.message and (error.param, error.code) == ("model", "model_not_found")


async def test_errors_of_the_template_are_the_clients():
    service = mock_service()

    def refuse(*args, **kwargs):
        raise ValueError("roles must alternate")

    service.chat_template.encode = refuse
    assert "alternate" in (await refused(service, GenerateInput(messages=[message("x")]))).message


async def test_the_event_loop_stays_free_while_a_prompt_is_tokenized():
    service = mock_service()
    gate = threading.Event()
    encode = service.tokenizer.encode
    service.tokenizer.encode = lambda *a, **k: gate.wait(60) and encode(*a, **k)
    task = asyncio.create_task(ask(service, "slow"))
    await asyncio.sleep(0.01)
    gate.set()
    assert (await task).finished


# -- requests ----------------------------------------------------------------------------------------------------------


async def test_n_shares_the_prompt_and_counts_once():
    service = mock_service(MockEngine(lambda r: str(r.params.seed % 1000).encode()))
    prepared = await service.prepare(GenerateInput(text="abc"), SamplingParams(n=3, seed=5, max_tokens=10))
    usage, outputs = Usage(), []
    async for output in service.generate(prepared):
        usage.add(output)
        outputs.append(output)
    assert (usage.prompt_tokens, usage.completion_tokens) == (4, sum(len(o.token_ids) for o in outputs))
    assert len({r.params.seed for r in service.client.requests}) == 3
    assert len({r.request_id for r in service.client.requests}) == 3
    assert {r.params.n for r in service.client.requests} == {1}


async def test_siblings_that_find_the_prompt_in_the_cache_do_not_count_as_cached():
    usage, result = Usage(), []
    for index, cached in ((0, 0), (1, 16), (0, 0)):
        usage.add(TextOutput(index=index, token_ids=(1,), num_prompt_tokens=20, num_cached_tokens=cached))
        result.append(usage.cached_tokens)
    assert (result, usage.completion_tokens, usage.total_tokens) == ([0, 0, 0], 3, 23)
    usage.add(TextOutput(index=0, num_prompt_tokens=20, num_cached_tokens=16))
    assert usage.cached_tokens == 16


async def test_prompt_logprobs_are_computed_once():
    service = mock_service()
    result = await ask(service, params=SamplingParams(n=3, prompt_logprobs=1, max_tokens=1))
    assert [r.params.prompt_logprobs for r in service.client.requests] == [1, None, None]
    assert len(result.prompt_logprobs) == len(result.prompt_token_ids)


async def test_same_seed_same_children():
    service = mock_service()
    for _ in range(2):
        await ask(service, params=SamplingParams(n=3, seed=-(2**63), max_tokens=1))
    seeds = [r.params.seed for r in service.client.requests]
    assert seeds[:3] == seeds[3:] and all(-(2**63) <= s < 2**63 for s in seeds)


@pytest.mark.parametrize("n", [1, 3])
async def test_cancelling_the_reader_aborts_every_completion(n):
    service = mock_service(MockEngine("word ", step_s=0.001, max_model_len=100_000))
    task = asyncio.create_task(ask(service, params=SamplingParams(n=n, ignore_eos=True, max_tokens=50_000)))
    await until(lambda: len(service.client.live) == n)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert not service.client.live and len(service.client.aborted) == n and service.num_live == 0


async def test_one_failing_completion_ends_its_siblings():
    engine = MockEngine("word ", step_s=0.001, max_model_len=100_000)
    service = mock_service(engine)
    engine.fail_next = "NaN"
    with pytest.raises(RequestError) as caught:
        await ask(service, params=SamplingParams(n=3, ignore_eos=True, max_tokens=50_000))
    assert (caught.value.kind, caught.value.message) == (ErrorKind.INTERNAL, "NaN")
    assert not engine.live


async def test_abort_by_name_ends_all_of_that_name_and_no_other():
    engine = MockEngine("word ", step_s=0.001, max_model_len=100_000)
    service = mock_service(engine)
    endless = SamplingParams(n=2, ignore_eos=True, max_tokens=50_000)
    tasks = [asyncio.create_task(ask(service, params=endless, request_id=name)) for name in ("a", "a", "b")]
    await until(lambda: len(engine.live) == 6)
    assert await service.abort("a")
    for task in tasks[:2]:
        assert [choice.finish_reason for choice in (await task).outputs] == ["abort", "abort"]
    assert len(engine.live) == 2 and not await service.abort("a")
    await service.abort_all()  # nobody asked for an end: the answer is not all there
    with pytest.raises(RequestError, match="shutting down") as cut:
        await tasks[2]
    assert cut.value.kind is ErrorKind.UNAVAILABLE


async def test_deadline_is_an_error_after_what_was_made():
    service = mock_service(MockEngine("word ", step_s=0.005, max_model_len=100_000))
    prepared = await service.prepare(
        GenerateInput(text="x", timeout_s=0.1), SamplingParams(ignore_eos=True, max_tokens=50_000)
    )
    seen = ""
    with pytest.raises(RequestError) as caught:
        async for output in service.generate(prepared):
            seen += output.text
            assert output.finish_reason is None
    assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED and seen.startswith("word")


async def test_draining_and_death_refuse():
    service = mock_service()
    service.client.die()
    assert "engine" in (await refused(service, GenerateInput(text="x"), kind=ErrorKind.UNAVAILABLE)).message
    service = mock_service()
    service.start_draining()
    assert (await refused(service, GenerateInput(text="x"), kind=ErrorKind.UNAVAILABLE)).retry_after_s
    assert await service.wait_idle(0.1)


async def test_bad_words_as_token_sequences():
    service = mock_service()
    await ask(service, params=SamplingParams(bad_words=["no"], max_tokens=1))
    assert service.client.requests[0].bad_words_token_ids == ((110, 111), (32, 110, 111))


# -- grammars ----------------------------------------------------------------------------------------------------------


class Digits:
    """Three digits, then the end."""

    def __init__(self):
        self.left = 3

    def fill_mask(self, mask_W):
        mask_W[:] = 0
        for token in range(ord("7"), ord("9") + 1) if self.left else (EOS,):
            mask_W[token // 32] |= np.int32(1 << token % 32) if token % 32 < 31 else np.int32(-(2**31))

    def accept(self, token):
        self.left -= 1
        return True

    @property
    def finished(self):
        return not self.left


class Compiler:
    def __init__(self, error=None, wait_s=0.0):
        self.error, self.wait_s = error, wait_s

    def compile(self, grammar):
        time.sleep(self.wait_s)
        if self.error:
            raise self.error
        return Digits


async def test_each_completion_has_its_own_grammar_state():
    service = mock_service(MockEngine(), grammar_compiler=Compiler())
    params = SamplingParams(n=2, structured_outputs=StructuredOutputs(regex="[7-9]{3}"), max_tokens=50)
    result = await ask(service, params=params)
    assert [choice.text for choice in result.outputs] == ["777", "777"]


async def test_a_grammar_made_elsewhere():
    async def constrain(prompt: str, params: SamplingParams):
        assert prompt == "x"
        return params, Digits

    service = mock_service(MockEngine())
    prepared = await service.prepare(GenerateInput(text="x"), SamplingParams(max_tokens=9), constrain=constrain)
    assert (await collect(prepared, service.generate(prepared))).outputs[0].text == "777"


@pytest.mark.parametrize(
    ("compiler", "limits", "kind", "word"),
    [
        (None, None, ErrorKind.UNIMPLEMENTED, "grammar"),
        (Compiler(ValueError("unsupported keyword 'not'")), None, ErrorKind.INVALID_ARGUMENT, "'not'"),
        (Compiler(wait_s=0.2), Limits(grammar_timeout_s=0.01), ErrorKind.INVALID_ARGUMENT, "to compile"),
    ],
)
async def test_grammars_that_cannot_be_compiled(compiler, limits, kind, word):
    service = mock_service(grammar_compiler=compiler, limits=limits)
    params = SamplingParams(structured_outputs=StructuredOutputs(regex="a"))
    assert word in (await refused(service, GenerateInput(text="x"), params, kind)).message


async def test_grammars_that_never_end_do_not_stop_others():
    gate = threading.Event()

    class Stuck:
        def compile(self, grammar):
            gate.wait(30)

    service = mock_service(MockEngine("fine"), grammar_compiler=Stuck(), limits=Limits(grammar_timeout_s=0.01))
    params = SamplingParams(structured_outputs=StructuredOutputs(regex="a"))
    try:
        for _ in range(4):
            await refused(service, GenerateInput(text="x"), params)
        assert (await ask(service)).outputs[0].text == "fine"
    finally:
        gate.set()


# -- the rest ----------------------------------------------------------------------------------------------------------


async def test_tokenize_and_detokenize_agree():
    service = mock_service()
    text, ids = await service.tokenize(GenerateInput(text="añb"))
    assert text == "añb" and await service.detokenize(ids, skip_special_tokens=True) == "añb"
    with pytest.raises(RequestError):
        await service.detokenize([10**6])


async def test_finish_reasons_are_words_that_clients_know():
    assert [r.value for r in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT)] == [
        "stop",
        "length",
        "abort",
    ]


async def test_defaults_of_the_model_apply_below_what_is_given():
    service = mock_service(default_params={"temperature": 0.3, "top_p": 0.8})
    params = service.make_params({"top_p": 0.5, "max_tokens": 7})
    assert (params.temperature, params.top_p, params.max_tokens) == (0.3, 0.5, 7)
    assert service.make_params({}).max_tokens is None
