"""Drafts under real grammars on the default model: 30 prompts alone, whose completions are held to schemas, expressions, choices
and tool calls, and the same ones among 64 mixed requests. Every token is the one without drafts.

Slow; `test_drafts.py` has the small ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from typing import Any

import jsonschema
import pytest

from models.loading.default_model import default_model
from serving.engine.api.sampling_params import StructuredOutputs
from serving.llm import LLM
from serving.service import ChatOptions, GenerateInput, collect, prepare_chat
from tests.serving.text.schemas import schemas

pytestmark = [pytest.mark.slow, pytest.mark.real_model]

SETTINGS: dict[str, Any] = {
    "dtype": "float32", "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 768, "kv_cache_memory": "384MiB",
    "progress": False,
}  # fmt: skip
REGEXES = (
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}", r"(yes|no)(, (yes|no)){3,6}\.", r"[A-Z][a-z]{2,9}( [a-z]{2,9}){4,9}\.",
    r"([0-9]+, ){4,8}[0-9]+", r"<b>[a-z ]{5,30}</b>", r"def [a-z_]{3,12}\([a-z]\):\n    return [a-z] \+ [0-9]{1,3}\n",
)  # fmt: skip
CHOICES = (("Paris", "Parma", "Paris, of course"), ("one", "one two", "one two three"), ("true", "false"), ("A", "B"))
PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 2, "maxLength": 24},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": name.replace("_", " "), "parameters": PLACE}}
    for name in ("get_weather", "get_weather_history")
]
CITIES = ("Paris", "Oslo", "Köln", "New York", "São Paulo", "Bern", "Lima", "Delhi")

Asked = tuple[GenerateInput, dict[str, Any], ChatOptions | None]


def asked(**more: Any) -> list[Asked]:
    """30 that are held to something, anew each time.

    Args:
        more: further sampling parameters.
    """

    def one(text: str, options: ChatOptions | None = None, **fields: Any) -> Asked:
        messages = [{"role": "user", "content": text}]
        given = GenerateInput(messages=messages, tools=None if options is None else TOOLS)
        return given, {"temperature": 0.0, "max_tokens": 64, **fields, **more}, options

    found = [
        one(
            f"Write a JSON value of this schema: {json.dumps(schema)[:300]}",
            structured_outputs=StructuredOutputs(json=schema),
        )
        for schema in schemas(12)
    ]
    found += [
        one("Write something that looks like this: " + regex, structured_outputs=StructuredOutputs(regex=regex))
        for regex in REGEXES
    ]
    found += [
        one(f"Which one: {', '.join(choice)}?", structured_outputs=StructuredOutputs(choice=choice))
        for choice in CHOICES
    ]
    named = {"type": "function", "function": {"name": "get_weather_history"}}
    for i, city in enumerate(CITIES):
        options = ChatOptions(named if i % 2 else "required", parallel_tool_calls=i % 4 < 2)
        found.append(one(f"How is the weather in {city}, and tomorrow in {city}?", options))
    assert len(found) == 30
    return found


def beside() -> list[Asked]:
    """34 more: the same drawn by chance, and such as nothing holds."""
    plain: list[Asked] = [
        (GenerateInput(text="One, two, three, four, one, two,"), {"temperature": 0.0, "max_tokens": 40, **fields}, None)
        for fields in ({"logprobs": 2}, {"frequency_penalty": 0.6}, {"stop": ["three"]}, {"min_tokens": 30})
    ]
    return [
        (given, fields | {"seed": i}, options) for i, (given, fields, options) in enumerate(asked(temperature=0.8))
    ] + plain


async def answer(llm: LLM, one: Asked) -> tuple[list[int], str | None, str]:
    """(tokens, why it ended, text)"""
    given, fields, options = one
    service = llm.service
    if options is None:
        prepared = await service.prepare(given, service.make_params(fields))
    else:
        prepared = await prepare_chat(service, given, fields, options)
    async with contextlib.aclosing(service.generate(prepared)) as stream:
        choice = (await collect(prepared, stream)).outputs[0]
    return list(choice.token_ids), choice.finish_reason, choice.text


def answers(llm: LLM) -> tuple[list[Any], list[Any]]:
    """(the 64 together, the 30 one by one)"""

    async def together() -> list[Any]:
        return list(await asyncio.gather(*(answer(llm, one) for one in [*asked(), *beside()])))

    async def in_turn() -> list[Any]:
        return [await answer(llm, one) for one in asked()]

    mixed, alone = llm._loop.run(together()), llm._loop.run(in_turn())
    llm._started.engine.runner.guard.check()
    return mixed, alone


@pytest.fixture(scope="module")
def expected() -> tuple[list[Any], list[Any]]:
    """What comes without drafts: each held to what it is to be held to."""
    with LLM(**SETTINGS) as llm:
        mixed, alone = answers(llm)
    assert mixed[:30] == alone
    for (_, fields, options), (_, reason, text) in zip(asked(), alone, strict=True):
        wanted = fields.get("structured_outputs")
        if options is not None:
            assert reason == "length" or '"get_weather' in text, text
        elif reason == "length":
            continue
        elif wanted.json is not None:
            jsonschema.validate(json.loads(text), wanted.json)
        else:
            assert text in wanted.choice if wanted.choice else re.fullmatch(wanted.regex, text)
    assert sum(reason != "length" for _, reason, _ in alone) > 12
    return mixed, alone


@pytest.mark.parametrize(
    "how",
    [
        {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 4},
        {"method": "suffix"},
        {"method": "draft_model"},
    ],
    ids=lambda how: how["method"],
)
def test_lossless_under_grammars(expected, how):
    """Of a draft model the model itself: right but where the grammar says otherwise."""
    more = {"num_speculative_tokens": 3, "enable_adaptive_verification": False}
    if how["method"] == "draft_model":
        more["model"] = str(default_model(progress=False))
    with LLM(speculative_config=how | more, **SETTINGS) as llm:
        found = answers(llm)
        stats = llm.stats()
    assert found[1] == expected[1]
    assert found[0] == expected[0]
    assert stats.num_draft_tokens > 300 and stats.num_accepted_tokens > 50
