"""What is right about texts, offsets and log probabilities."""

from __future__ import annotations

from typing import Any

from serving.service import TextService
from tests.field.harness import Line, ask, right, streamed, templated
from tests.mock_engine import MockEngine, mock_service
from tests.serving.text.vocabularies import sentencepiece

# -- text and logprobs --------------------------------------------------------------------------------------------------


def offsets_fit(choice: dict[str, Any]) -> None:
    text, offsets = choice["text"], choice["logprobs"]["text_offset"]
    assert len(offsets) == len(choice["logprobs"]["tokens"])
    assert offsets == sorted(offsets) and all(0 <= at <= len(text) for at in offsets), (text, offsets)


@right("offsets")
async def _offsets(line: Line) -> None:
    reply = "né 世!"
    status, body = await ask(mock_service(MockEngine(reply=reply)), line, max_tokens=20)
    (choice,) = body["choices"]
    assert status == 200 and choice["text"] == line["body"]["prompt"] + reply
    offsets_fit(choice)
    # Byte tokens: BOS, the prompt's, the reply's, and the end. The bytes of a character begin where it does.
    where, at = [0], 0
    for char in choice["text"]:
        where += [at] * len(char.encode())
        at += 1
    assert choice["logprobs"]["text_offset"] == [*where, at]
    chunks = await streamed(mock_service(MockEngine(reply=reply)), line, max_tokens=20, stream=True)
    told, offsets = "", []
    for chunk in chunks:
        told += chunk["choices"][0]["text"]
        offsets += chunk["choices"][0]["logprobs"]["text_offset"]
        assert not offsets or offsets[-1] <= len(told)
    assert offsets == choice["logprobs"]["text_offset"]
    status, body = await ask(
        mock_service(MockEngine(reply="one STOP two")), line, max_tokens=20, echo=False, stop=["STOP"]
    )
    offsets_fit(body["choices"][0])
    assert body["choices"][0]["text"] == "one "


@right("offsets-control")
async def _offsets_control(line: Line) -> None:
    service = mock_service(MockEngine(reply=[256, 97, 260, 98]))
    status, body = await ask(service, line, prompt=[256, 120, 257, 121])
    assert status == 200 and body["choices"][0]["text"] == "xya"
    offsets_fit(body["choices"][0])
    assert body["choices"][0]["logprobs"]["text_offset"] == [0, 0, 1, 1, 2, 2, 3]
    assert next(iter(body["choices"][0]["logprobs"]["top_logprobs"][1])) == "x", "the prompt's own token comes first"
    offsets_fit((await ask(service, line))[1]["choices"][0])


@right("sentencepiece-space")
async def _sentencepiece_space(line: Line) -> None:
    tokenizer = sentencepiece()
    word = tokenizer.encode("the the", add_special_tokens=False)[-1:]
    engine = MockEngine(reply=lambda request: word * 2)
    engine._info = engine._info.__class__(**{**engine._info.__dict__, "vocab_size": tokenizer.vocab_size})
    service = TextService(engine, tokenizer, None, model_id="mock")
    shown = tokenizer.token_bytes(word[0]).decode()
    assert shown.startswith(" ")
    status, body = await ask(service, line)
    assert status == 200 and body["choices"][0]["text"] == shown * 2
    status, body = await ask(service, line, echo=True)
    (choice,) = body["choices"]
    assert choice["text"] == line["body"]["prompt"] + shown * 2
    offsets_fit(choice)
    assert choice["logprobs"]["text_offset"][-1] == len(choice["text"]) - len(shown)


@right("bos-twice")
async def _bos_twice(line: Line) -> None:
    _, service = templated("<s>{% for m in messages %}{{ m.content }}{% endfor %}")
    assert service.tokenizer.encode("a")[0] != service.tokenizer.bos_token_id, "this tokenizer adds none of its own"
    plain = (await ask(service, line, add_special_tokens=False))[1]["tokens"]
    assert (await ask(service, line))[1]["tokens"] == plain
