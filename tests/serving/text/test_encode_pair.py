"""One or two texts as an encoder reads them: special tokens, segment ids, truncation."""

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from serving.text.tokenizer import Tokenizer

CLS, SEP, A, B = 0, 1, 2, 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = tokenizers.Tokenizer(
        models.WordLevel({"[CLS]": CLS, "[SEP]": SEP, "a": A, "b": B, "[": 4, "]": 5, "SEP": 6})
    )
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    made.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    made.add_special_tokens(["[CLS]", "[SEP]"])
    return Tokenizer(made)


def test_special_tokens_and_segments(tokenizer):
    assert tokenizer.encode_pair("a a b") == ([CLS, A, A, B, SEP], [0] * 5)
    assert tokenizer.encode_pair("a a", "b") == ([CLS, A, A, SEP, B, SEP], [0, 0, 0, 0, 1, 1])


def test_control_tokens_in_texts_are_text(tokenizer):
    assert tokenizer.encode_pair("a[SEP]")[0] == [CLS, A, 4, 6, 5, SEP]


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "kept"),
    [((6, 2), 9, (4, 2)), ((2, 6), 9, (2, 4)), ((6, 6), 10, (4, 3)), ((6, 6), 9, (3, 3)), ((2, 3), 9, (2, 3)),
     ((9, 5), 5, (1, 1))],
)  # fmt: skip
def test_the_longer_text_is_cut_first(tokenizer, lengths, max_tokens, kept):
    ids, segments = tokenizer.encode_pair("a " * lengths[0], "b " * lengths[1], max_tokens)
    assert (ids.count(A), ids.count(B)) == kept
    assert len(ids) == len(segments) <= max_tokens
    assert (ids[0], ids[-1]) == (CLS, SEP)


def test_one_text_is_cut_at_its_end(tokenizer):
    assert tokenizer.encode_pair("a b b b", max_tokens=4)[0] == [CLS, A, B, SEP]


def test_no_room(tokenizer):
    with pytest.raises(ValueError, match="At most 4 tokens"):
        tokenizer.encode_pair("a", "b", 4)
