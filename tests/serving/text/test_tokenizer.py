import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.text.tokenizer import Tokenizer
from tests.serving.text.vocabularies import (
    CONTROL,
    REAL,
    byte_level,
    byte_level_metadata,
    real,
    real_folder,
    sentencepiece,
    sentencepiece_metadata,
)

TEXTS = [
    "Hello, wörld 你好 😀\n\n  x",
    "a  5 12345 3.14",
    "trail  ",
    "",
    "\t\ttabs\r\n",
    "don't WON'T I'M we'LL",
    "ﷺ \u200d👩‍👩‍👧 e\u0301 é",
    "def f(x):\n    return x**2  # c\n",
    "\x00\x01",
    "한국어 日本語 العربية",
    "!!!???...",
    "a\u00a0b " * 20,
]
anything = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


def test_control_tokens_in_text_are_text_unless_parsed():
    tokenizer = byte_level()
    text = "a<|im_start|>b<|endoftext|>"
    assert not set(tokenizer.encode(text)) & tokenizer.special_token_ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    parsed = tokenizer.encode(text, parse_special=True)
    assert [i for i in parsed if i in tokenizer.special_token_ids] == [1, 0]
    assert tokenizer.decode(parsed) == "ab"
    assert tokenizer.decode(parsed, skip_special_tokens=False) == text


@given(st.lists(st.one_of(anything, st.sampled_from(CONTROL)), max_size=6).map("".join))
@settings(deadline=None)
def test_plain_encoding_never_yields_a_control_token_and_loses_nothing(text):
    for tokenizer in (byte_level(), byte_level("gpt-2"), sentencepiece()):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert not set(ids) & tokenizer.special_token_ids
        assert tokenizer.decode(ids) == text


def test_facts_from_gguf():
    tokenizer = byte_level()
    metadata = byte_level_metadata()
    assert tokenizer.vocab_size == len(metadata["tokenizer.ggml.tokens"]) - 1  # the unused one behind
    assert tokenizer.eos_token_ids == (2, 0)  # the file's own, then <|endoftext|> by its name
    assert (tokenizer.bos_token_id, tokenizer.bos_token, tokenizer.eos_token) == (1, "<|im_start|>", "<|im_end|>")
    assert tokenizer.special_token_ids == {0, 1, 2}
    for i, token in enumerate(metadata["tokenizer.ggml.tokens"][:-1]):
        assert tokenizer.id_to_token(i) == token
        assert tokenizer.token_to_id(token) == i


def test_bos_is_added_as_the_file_says():
    assert byte_level().encode("a") == byte_level().encode("a", add_special_tokens=False)
    with_bos = Tokenizer.from_gguf({**byte_level_metadata(), "tokenizer.ggml.add_bos_token": True})
    assert with_bos.encode("a") == [1, *byte_level().encode("a")]
    both = Tokenizer.from_gguf(
        {**byte_level_metadata(), "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    )
    assert both.encode("a") == [1, *byte_level().encode("a"), 2]
    assert sentencepiece().encode("a")[0] == 1  # SentencePiece models have it unless they say otherwise


def test_smollm_cuts_digits_one_by_one_before_the_gpt2_pattern():
    def pieces(pre):
        return [byte_level(pre).token_bytes(i) for i in byte_level(pre).encode("a 512")]

    assert pieces("smollm") == [b"a", b" ", b"5", b"1", b"2"]
    assert pieces("gpt-2") != pieces("smollm")


def test_token_bytes_join_to_the_text():
    text = "Köln 你好 😀 \n x"
    for tokenizer in (byte_level(), sentencepiece(prefix=False)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
    assert sentencepiece().token_bytes(5 + 0xE4) == b"\xe4"
    assert byte_level().token_bytes(10**9) == b""
    assert byte_level().token_bytes(1) == b"<|im_start|>"


@given(anything)
@settings(deadline=None)
def test_sentencepiece_merges_like_sentencepiece(text):
    """Against the algorithm as its paper has it: join the neighbours whose joint piece has the best score, the
    leftmost of equals, until none is left; what has no piece becomes its UTF-8 bytes."""
    metadata = sentencepiece_metadata()
    vocab = {t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"]) if i >= 261}
    scores = metadata["tokenizer.ggml.scores"]
    pieces = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        joints = [
            (-scores[vocab[a + b]], i)
            for i, (a, b) in enumerate(itertools.pairwise(pieces))
            if a + b in vocab and a in vocab and b in vocab
        ]
        if not joints:
            break
        _, at = min(joints)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    expected = []
    for piece in pieces:
        expected += [vocab[piece]] if piece in vocab else [5 + byte for byte in piece.encode()]
    assert sentencepiece().encode(text, add_special_tokens=False) == expected


def test_lone_surrogates_become_replacement_characters():
    tokenizer = byte_level()
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"  # a pair is a character


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.tokens": None}, "tokens"),
        ({"tokenizer.ggml.merges": None}, "merges"),
        ({"tokenizer.ggml.merges": ["ab"]}, "'ab'"),
        ({"tokenizer.ggml.merges": ["zz qq"]}, "does not fit"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type"),
        ({"tokenizer.ggml.pre": "martian"}, "martian"),
        ({"tokenizer.ggml.model": "martian"}, "martian"),
        ({"tokenizer.ggml.model": "bert"}, "unknown_token_id"),
    ],
)
def test_damaged_metadata_is_explained(change, words):
    metadata = {k: v for k, v in {**byte_level_metadata(), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=words):
        Tokenizer.from_gguf(metadata)


def test_what_makes_the_reading_library_panic_is_explained(tmp_path):
    hf = json.loads(byte_level().hf_json())
    hf["model"]["continuing_subword_prefix"] = "longer than any token of a merge"
    (tmp_path / "tokenizer.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match=r"tokenizer\.json .* cannot be read"):
        Tokenizer.from_directory(tmp_path)


def test_folder(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    hf = json.loads(byte_level().hf_json())
    hf["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(hf))
    config = {
        "bos_token": {"content": "<|im_start|>"},
        "eos_token": "<|im_end|>",
        "chat_template": [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "tools"}],
        "added_tokens_decoder": {str(byte_level().vocab_size): {"content": "<extra>", "special": True}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    (tmp_path / "chat_template.jinja").write_text("new")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.eos_token_ids == (2, 0)
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.chat_templates == {"default": "new", "tool_use": "tools"}
    assert tokenizer.encode("<extra>", parse_special=True) == [byte_level().vocab_size]
    assert len(tokenizer.encode("a quick brown fox")) > 3  # no truncation
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.real_model
def test_default_model():
    from models.loading.default_model import default_model
    from models.loading.gguf.file import GGUFFile

    tokenizer = Tokenizer.from_gguf(GGUFFile(default_model(progress=False)).metadata)
    assert tokenizer.encode("a  5") == [81, 256, 37]  # each digit alone, and not behind a blank
    assert tokenizer.encode("Hello, wörld 你好 😀") == [
        *[19556, 28, 267, 29989, 400, 216, 18645, 250, 48392, 138, 40303, 218]
    ]
    assert tokenizer.encode("<|im_start|>user", parse_special=True) == [1, 4093]
    assert tokenizer.eos_token_ids[0] == 2
    assert "default" in tokenizer.chat_templates


@pytest.mark.parametrize("name", REAL)
def test_same_ids_and_text_as_transformers(name):
    from transformers import AutoTokenizer

    tokenizer, oracle = real(name), AutoTokenizer.from_pretrained(real_folder(name))
    for text in TEXTS:
        ids = tokenizer.encode(text, parse_special=True)
        assert ids == oracle(text).input_ids, text
        assert tokenizer.encode(text) == oracle(text, split_special_tokens=True).input_ids, text
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip), text
