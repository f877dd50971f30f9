"""Prompts that an embedding model's authors put in front of texts."""

import dataclasses

import pytest

from serving.errors import RequestError
from serving.service import GenerateInput
from serving.service.vectors import prompted
from tests.mock_engine import MockEngine

INFO = dataclasses.replace(
    MockEngine().info(), prompts=(("query", "query: "), ("document", "")), default_prompt="query: "
)


def test_a_prompt_goes_in_front_of_a_text():
    assert prompted(GenerateInput(text="a"), INFO, None).text == "query: a"
    assert prompted(GenerateInput(text="a"), INFO, "query").text == "query: a"
    assert prompted(GenerateInput(text="a"), INFO, "document").text == "a"
    plain = dataclasses.replace(INFO, default_prompt="")
    assert prompted(GenerateInput(text="a"), plain, None).text == "a"


def test_token_ids_stay_as_they_are():
    given = GenerateInput(token_ids=(1, 2))
    assert prompted(given, INFO, "query") == given


def test_unknown_prompts_are_named():
    with pytest.raises(RequestError, match="no prompt named 'passage': it has 'query', 'document'"):
        prompted(GenerateInput(text="a"), INFO, "passage")
    with pytest.raises(RequestError, match="no prompt named 'passage': it has none"):
        prompted(GenerateInput(text="a"), dataclasses.replace(INFO, prompts=()), "passage")
