"""Blanks at the beginning of words, where the vocabulary marks them there, and the BOS that a template writes itself."""

import dataclasses

import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.service import GenerateInput, TextService, collect
from serving.service.requests.limits import Limits
from serving.service.requests.prepare import render_and_encode
from serving.text.chat_template import ChatTemplate
from tests.mock_engine import MockEngine
from tests.serving.text.vocabularies import byte_level, sentencepiece

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
TOKENIZER = sentencepiece()


class WideEngine(MockEngine):
    def info(self):
        return dataclasses.replace(super().info(), vocab_size=TOKENIZER.vocab_size)


def service(reply):
    engine = WideEngine(TOKENIZER.encode(reply, add_special_tokens=False))
    return TextService(engine, TOKENIZER, ChatTemplate(TEMPLATE, TOKENIZER), model_id="sp")


async def ask(given, reply="fox fox", **params):
    one = service(reply)
    prepared = await one.prepare(given, SamplingParams(max_tokens=20, **params))
    return (await collect(prepared, one.generate(prepared))).outputs[0]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (GenerateInput(text="The quick"), " fox fox"),
        (GenerateInput(token_ids=tuple(TOKENIZER.encode("The quick"))), " fox fox"),
        # At the beginning of a text, or of an assistant's turn, it is the tokenizer's own blank.
        (GenerateInput(token_ids=(1,)), "fox fox"),
        (GenerateInput(messages=({"role": "user", "content": "The quick"},)), "fox fox"),
    ],
)
async def test_a_completion_joins_its_prompt_with_the_blank_between(given, text):
    assert (await ask(given)).text == text


async def test_stop_strings_see_the_blank():
    output = await ask(GenerateInput(text="The quick"), stop=[" fox f"], include_stop_str_in_output=True)
    assert output.text == " fox f"


def test_a_bos_is_put_once():
    limits = Limits.for_model(512)
    template = ChatTemplate(TEMPLATE, TOKENIZER)
    chat = GenerateInput(messages=({"role": "user", "content": "fox"},), add_special_tokens=True)
    _, ids = render_and_encode(chat, TOKENIZER, template, limits)
    assert ids[:2] != [1, 1] and ids[0] == 1
    _, ids = render_and_encode(chat, TOKENIZER, ChatTemplate("{{ messages[0].content }}", TOKENIZER), limits)
    assert ids[0] == 1
    # A tokenizer that puts none around a text puts none around a chat.
    plain = byte_level()
    _, ids = render_and_encode(chat, plain, ChatTemplate(TEMPLATE, plain), limits)
    assert ids.count(plain.bos_token_id) == 1 and ids[0] == plain.bos_token_id
    _, ids = render_and_encode(chat, plain, ChatTemplate("{{ messages[0].content }}", plain), limits)
    assert plain.bos_token_id not in ids
