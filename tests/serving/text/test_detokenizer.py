import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.text.detokenizer import IncrementalDetokenizer
from tests.serving.text.vocabularies import REAL, byte_level, real, sentencepiece


def split(ids, cuts):
    edges = [0, *sorted({min(cut, len(ids)) for cut in cuts}), len(ids)]
    return [ids[a:b] for a, b in itertools.pairwise(edges)]


ids_and_cuts = st.tuples(
    st.lists(st.integers(0, 700), max_size=30),  # beyond the vocabulary too: logits are padded
    st.lists(st.integers(0, 30), max_size=6),
    st.booleans(),
)


@given(ids_and_cuts)
@settings(deadline=None, max_examples=300)
def test_pieces_join_to_the_whole_whatever_the_split(case):
    ids, cuts, skip = case
    for tokenizer in (byte_level(), sentencepiece(), sentencepiece(prefix=False)):
        stream = IncrementalDetokenizer(tokenizer, skip)
        pieces = [stream.push(part) for part in split(ids, cuts)]
        assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip)


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
@settings(deadline=None)
def test_token_by_token_never_shows_half_a_character(text):
    for tokenizer in (byte_level(), sentencepiece()):
        stream = IncrementalDetokenizer(tokenizer)
        pieces = [stream.push([i]) for i in tokenizer.encode(text)]
        assert stream.finish() == ""
        assert "".join(pieces) == text
        assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


def test_half_a_character_waits_and_is_replaced_at_the_end():
    tokenizer = sentencepiece()
    stream = IncrementalDetokenizer(tokenizer)
    snow = [5 + byte for byte in "☃".encode()]
    assert stream.push(snow[:2]) == ""
    assert stream.push(snow[2:]) == "☃"
    assert stream.push(snow[:1]) == ""
    assert stream.finish() == "\ufffd"


def test_leading_blank_belongs_to_the_prompt_when_the_text_goes_on():
    tokenizer = sentencepiece()
    ids = tokenizer.encode("The", add_special_tokens=False)
    assert IncrementalDetokenizer(tokenizer).push(ids) == "The"
    assert IncrementalDetokenizer(tokenizer, continues=True).push(ids) == " The"


@pytest.mark.parametrize("name", REAL)
def test_real_vocabularies(name):
    tokenizer = real(name)
    text = "Grüße 你好 😀👩‍👩‍👧\n\n    x = 12345  # ok\t"
    stream = IncrementalDetokenizer(tokenizer)
    ids = tokenizer.encode(text)
    assert "".join(stream.push([i]) for i in ids) + stream.finish() == text
