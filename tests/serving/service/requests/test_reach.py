"""Constraints and bans together: what leaves nothing to say is refused, what leaves something is not."""

import pytest

from serving.engine.api.sampling_params import SamplingParams, StructuredOutputs
from serving.errors import RequestError
from serving.service.requests.prepare import bad_word_ids
from serving.service.requests.reach import check_reach
from serving.text.grammar import GrammarCompiler
from tests.serving.text.vocabularies import byte_level

TOKENIZER = byte_level()
WIDTH = 1024
COMPILER = GrammarCompiler(TOKENIZER, WIDTH)


def ids(*texts):
    return tuple(TOKENIZER.token_to_id(text) for text in texts)


@pytest.mark.parametrize(
    ("wanted", "bans", "right"),
    [
        ({"choice": ("yes", "no")}, {"allowed_token_ids": (5,)}, False),
        ({"choice": ("yes", "no")}, {"allowed_token_ids": ids("n", "y", "e")}, False),
        ({"choice": ("yes", "no")}, {"allowed_token_ids": ids("n", "o")}, True),
        ({"choice": ("yes", "no")}, {"allowed_token_ids": ids("y", "e", "s")}, True),
        ({"choice": ("yes", "no")}, {"bad_words": ("yes", "no")}, False),
        ({"choice": ("yes", "no")}, {"bad_words": ("yes",)}, True),
        ({"choice": ("yes",)}, {"bad_words": ("e",)}, False),
        ({"regex": "a+"}, {"allowed_token_ids": ids("b")}, False),
        ({"regex": "[ab]+"}, {"allowed_token_ids": ids("b")}, True),
        ({"json": {"type": "boolean"}}, {"allowed_token_ids": ids("{")}, False),
        ({"regex": "[ab]+"}, {}, True),
    ],
)
def test_what_leaves_nothing_to_say_is_refused(wanted, bans, right):
    params = SamplingParams(structured_outputs=StructuredOutputs(**wanted), **bans)
    words = bad_word_ids(params.bad_words, TOKENIZER)
    constraint = COMPILER.compile(params.structured_outputs)
    if right:
        check_reach(constraint, params, words, TOKENIZER, WIDTH)
        return
    with pytest.raises(RequestError, match="no completion satisfies both") as error:
        check_reach(constraint, params, words, TOKENIZER, WIDTH)
    assert error.value.param in ("allowed_token_ids", "bad_words")
