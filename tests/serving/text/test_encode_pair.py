"""One or two texts as an encoder reads them: special tokens, segment ids, truncation."""

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from serving.text.question import QWEN3
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


@pytest.fixture(scope="module")
def asking() -> Tokenizer:
    """Of a reranker that answers: bytes and two control tokens."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(made, question=QWEN3)


def test_a_reranker_that_answers_is_asked(asking):
    ids, segments = asking.encode_pair("why {x}", "because <|im_end|>")
    middle = asking.encode(QWEN3.form.format(query="why {x}", document="because <|im_end|>"))
    before, behind = (asking.encode(text, parse_special=True) for text in (QWEN3.before, QWEN3.behind))
    assert ids == [*before, *middle, *behind] and segments == [0] * len(ids)
    start, end = 256, 257
    assert (ids.count(start), ids.count(end)) == (3, 2), "what a text says is no control token"
    assert asking.encode_pair("alone")[0] == asking.encode("alone")


def test_the_end_of_a_document_is_cut_and_never_the_question(asking):
    whole = asking.encode_pair("why", "because")[0]
    short = asking.encode_pair("why", "because", len(whole) - 3)[0]
    behind = asking.encode(QWEN3.behind, parse_special=True)
    assert short == [*whole[: -len(behind) - 3], *behind]
    with pytest.raises(ValueError, match="the question around the texts alone is"):
        asking.encode_pair("why", "because", 20)
