"""WordPiece from GGUF metadata against the same vocabulary as a tokenizer.json holds it."""

import os
from pathlib import Path

import pytest
import tokenizers

from serving.text.tokenizer import Tokenizer

PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[unused0]",
    "a",
    "##b",
    "##bc",
    "hello",
    "world",
    "##s",
    "!",
    "##!",
]
TEXTS = ["Hello worlds!", "abbc  ab", "zzz a", "HÉLLO [SEP] a", ""]
FOLDER = os.environ.get("JAXSERVE_TEST_MODELS")
MINILM = Path(FOLDER) / "minilm" / "tokenizer.json" if FOLDER else None


def metadata(pieces: list[str]) -> dict:
    """As llama.cpp's converter writes a BERT vocabulary."""

    def spelled(piece: str) -> str:
        if piece.startswith("##"):
            return piece[2:]
        return piece if piece.startswith("[") and piece.endswith("]") and len(piece) > 2 else "\u2581" + piece

    control = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": [spelled(piece) for piece in pieces],
        "tokenizer.ggml.token_type": [3 if piece in control else 1 for piece in pieces],
        "tokenizer.ggml.cls_token_id": pieces.index("[CLS]"),
        "tokenizer.ggml.seperator_token_id": pieces.index("[SEP]"),
        "tokenizer.ggml.unknown_token_id": pieces.index("[UNK]"),
        "tokenizer.ggml.padding_token_id": pieces.index("[PAD]"),
    }


def test_pieces_pairs_and_control_tokens():
    tokenizer = Tokenizer.from_gguf(metadata(PIECES))
    ids = {piece: i for i, piece in enumerate(PIECES)}
    around = lambda *pieces: [ids[p] for p in ("[CLS]", *pieces, "[SEP]")]  # noqa: E731
    assert tokenizer.encode("Hello worlds!") == around("hello", "world", "##s", "!")
    assert tokenizer.encode("abbc zzz") == around("a", "##b", "##bc", "[UNK]")
    assert tokenizer.encode_pair("a", "hello") == (
        [ids[p] for p in ("[CLS]", "a", "[SEP]", "hello", "[SEP]")],
        [0, 0, 0, 1, 1],
    )
    assert ids["[SEP]"] not in tokenizer.encode("a [SEP]", add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode("hello worlds")) == "hello worlds"


def test_what_is_missing_is_named():
    lacking = metadata(PIECES)
    del lacking["tokenizer.ggml.cls_token_id"]
    with pytest.raises(ValueError, match="cls_token_id"):
        Tokenizer.from_gguf(lacking)


@pytest.mark.skipif(MINILM is None or not MINILM.exists(), reason="JAXSERVE_TEST_MODELS has no minilm/tokenizer.json")
def test_minilms_vocabulary():
    real = tokenizers.Tokenizer.from_file(str(MINILM))
    real.no_padding()
    real.no_truncation()
    vocab = real.get_vocab()
    ours = Tokenizer.from_gguf(metadata(sorted(vocab, key=vocab.__getitem__)))
    for text in [*TEXTS, "Grüße aus Köln: l'été, 中文 and 3.5 % — naïve café!", "def f(x): return x+1"]:
        assert ours.encode(text, parse_special=True) == real.encode(text).ids
