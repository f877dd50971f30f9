"""Generate, Tokenize, Detokenize over a real connection."""

import pytest

from proto.jaxserve.v1 import inference_pb2 as pb
from proto.jaxserve.v1.sampling_pb2 import SamplingParams
from tests.mock_engine import END, MockEngine, until


async def read(call):
    return [message async for message in call]


def text_of(messages, index=0):
    return "".join(m.text for m in messages if m.index == index)


async def test_text_streams_back_as_deltas_then_reason_and_usage(serve):
    async with serve(MockEngine("Grüße!")) as s:
        messages = await read(s.inference.Generate(pb.GenerateRequest(text="hi", request_id="r1")))
    assert text_of(messages) == "Grüße!"
    assert len(messages) > 4, "one message a token"
    assert {m.request_id for m in messages} == {"r1"}
    assert [m.finish_reason for m in messages[:-1]] == [pb.FINISH_REASON_UNSPECIFIED] * (len(messages) - 1)
    last = messages[-1]
    assert last.finish_reason == pb.FINISH_REASON_STOP and last.WhichOneof("stop_reason") is None
    assert last.usage.prompt_tokens == 3  # BOS and two bytes
    assert last.usage.completion_tokens == len("Grüße!".encode()) + 1
    assert sum(len(m.token_ids) for m in messages) == last.usage.completion_tokens
    assert 0 < last.usage.time_to_first_token_s <= last.usage.total_s


async def test_chat_goes_through_the_template(serve):
    async with serve(MockEngine("ok")) as s:
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="ping")])
        messages = await read(s.inference.Generate(pb.GenerateRequest(chat=chat)))
        tokens = await s.inference.Tokenize(pb.TokenizeRequest(chat=chat))
    assert text_of(messages) == "ok"
    assert tokens.text == "<|user|>ping<|end|><|assistant|>"
    assert s.engine.requests[0].prompt_token_ids == tuple(tokens.token_ids)


async def test_continue_final_message_leaves_it_open(serve):
    async with serve() as s:
        turns = [pb.ChatMessage(role="user", content="a"), pb.ChatMessage(role="assistant", content="so")]
        chat = pb.Chat(messages=turns, continue_final_message=True)
        tokens = await s.inference.Tokenize(pb.TokenizeRequest(chat=chat))
    assert tokens.text.endswith("<|assistant|>so")


async def test_token_ids_are_taken_as_they_are(serve):
    async with serve() as s:
        ids = pb.TokenIds(ids=[104, 105, END])
        await read(s.inference.Generate(pb.GenerateRequest(token_ids=ids)))
    assert s.engine.requests[0].prompt_token_ids == (104, 105, END)


async def test_every_sampling_parameter_reaches_the_engine(serve):
    wire = SamplingParams(
        n=1, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, seed=-3, repetition_penalty=1.1, presence_penalty=0.2,
        frequency_penalty=0.3, logit_bias={7: -1.5}, allowed_token_ids=[97, 98], bad_words=["zz"], min_tokens=1,
        max_tokens=4, stop=["q"], stop_token_ids=[98], include_stop_str_in_output=True, ignore_eos=True, logprobs=2,
        prompt_logprobs=1, skip_special_tokens=False, spaces_between_special_tokens=False, detokenize=True,
    )  # fmt: skip
    async with serve(MockEngine("a")) as s:
        await read(s.inference.Generate(pb.GenerateRequest(text="x", sampling_params=wire)))
    params = s.engine.requests[0].params
    for field in wire.DESCRIPTOR.fields:
        if field.name == "structured_outputs":
            continue
        want, got = getattr(wire, field.name), getattr(params, field.name)
        assert (
            (dict(want) == got)
            if field.name == "logit_bias"
            else (tuple(want) == got if field.is_repeated else want == got)
        )
    assert s.engine.requests[0].bad_words_token_ids == ((122, 122), (32, 122, 122))


async def test_unset_parameters_take_the_models_defaults_and_zero_is_not_unset(serve):
    async with serve(MockEngine("a"), default_params={"temperature": 0.25, "top_k": 7}) as s:
        await read(s.inference.Generate(pb.GenerateRequest(text="x")))
        zero = SamplingParams(temperature=0, top_k=0)
        await read(s.inference.Generate(pb.GenerateRequest(text="x", sampling_params=zero)))
    first, second = (r.params for r in s.engine.requests)
    assert (first.temperature, first.top_k) == (0.25, 7)
    assert (second.temperature, second.top_k) == (0.0, 0)
    assert first.max_tokens == 512 - 2, "what the context leaves"


async def test_stop_string_ends_the_text_before_it_and_the_engine_is_told(serve):
    async with serve(MockEngine("one two three four", step_s=0.002)) as s:
        wire = SamplingParams(stop=["three", "nine"])
        messages = await read(s.inference.Generate(pb.GenerateRequest(text="x", sampling_params=wire)))
        assert text_of(messages) == "one two "
        assert messages[-1].finish_reason == pb.FINISH_REASON_STOP and messages[-1].stop_string == "three"
        await until(lambda: len(s.engine.aborted) == 1 and not s.engine.live, "the engine was told")


async def test_n_completions_with_their_own_seeds(serve):
    def reply(request):
        return f"{request.params.seed % 97}".encode()

    async with serve(MockEngine(reply)) as s:
        wire = SamplingParams(n=4, seed=42)
        messages = await read(s.inference.Generate(pb.GenerateRequest(text="x", sampling_params=wire)))
        alone = await read(s.inference.Generate(pb.GenerateRequest(text="x", sampling_params=SamplingParams(seed=42))))
    texts = [text_of(messages, i) for i in range(4)]
    assert texts[0] == text_of(alone) == "42"
    assert len({r.params.seed for r in s.engine.requests[:4]}) == 4
    assert sorted(m.index for m in messages if m.finish_reason) == [0, 1, 2, 3]


async def test_logprobs_carry_texts_and_bytes(serve):
    async with serve(MockEngine("é")) as s:
        wire = SamplingParams(logprobs=2, prompt_logprobs=0)
        messages = await read(s.inference.Generate(pb.GenerateRequest(text="ab", sampling_params=wire)))
    entries = [entry for m in messages for entry in m.logprobs]
    assert b"".join(e.token_bytes for e in entries[:2]).decode() == "é"
    assert entries[0].token == "\ufffd"
    assert [len(e.top) for e in entries] == [2, 2, 2]
    prompt = messages[0].prompt_logprobs
    assert len(prompt) == 3 and not prompt[0].HasField("logprob") and prompt[1].token == "a"


async def test_detokenize(serve):
    async with serve() as s:
        reply = await s.inference.Detokenize(pb.DetokenizeRequest(token_ids=[104, 105, END]))
        assert reply.text == "hi<|end|>"
        reply = await s.inference.Detokenize(pb.DetokenizeRequest(token_ids=[104, 105, END], skip_special_tokens=True))
        assert reply.text == "hi"


@pytest.mark.parametrize("model", ["", "default", "mock", "mock-1b", "other-name"])
async def test_names_of_the_base_model(serve, model):
    async with serve(MockEngine("y"), aliases=["other-name"]) as s:
        messages = await read(s.inference.Generate(pb.GenerateRequest(text="x", model=model)))
    assert text_of(messages) == "y"
