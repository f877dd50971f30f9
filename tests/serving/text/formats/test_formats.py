"""Vocabulary files other than tokenizer.json, each against the library that made it, on texts that are hard to cut."""

import base64
import io
import itertools
import json
import random
import re
import unicodedata

import pytest
import sentencepiece
import tiktoken

from serving.text.formats.pretokenizers import KIMI_K2, LLAMA3, PRE_TOKENIZERS, QWEN2, TEKKEN
from serving.text.tokenizer import Tokenizer
from tests.serving.text.vocabularies import CORPUS, byte_level, byte_level_metadata, real, real_folder

ALPHABET = "aB 1\n'\t.é漢😀ñ_/<|>"
TEXTS = [
    *(
        "Hello world",
        "  two  spaces\n\n\t tabs",
        "don't WON'T I'M",
        "12345 1234567 ١٢٣",
        "你好，世界！漢字テスト",
        "é e\u0301",
    ),
    *("😀👩‍👩‍👧‍👦", "a\u200bb\u00a0c", "\r\n\r\nx", "def f(x):\n    return x**2  # ok\n", " leading", "trailing ", ""),
    *("ǅungla ʔa", "नमस्ते दुनिया", "ไทย", "𝔘𝔫𝔦", "\x00\x01", "camelCaseHTTPServer", "///**--==", "a" * 100, "ABCdef'LL"),
]
_RNG = random.Random(0)
TEXTS += ["".join(_RNG.choice(ALPHABET) for _ in range(_RNG.randrange(1, 40))) for _ in range(200)]


def ranked(pattern, size=700):
    """Ranks of a byte-pair vocabulary, as tiktoken trains them."""
    words = [word.encode() for line in CORPUS * 2 for word in re.findall(r"\s?\w+|\s?[^\s\w]+|\s+", line)]
    return tiktoken_train(words, size)


def tiktoken_train(words, size):
    ranks = {bytes([byte]): byte for byte in range(256)}
    parts = [[bytes([byte]) for byte in word] for word in words]
    while len(ranks) < size:
        counts = {}
        for word in parts:
            for pair in itertools.pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        joined = best[0] + best[1]
        ranks[joined] = len(ranks)
        for word in parts:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [joined]
                i += 1
    return ranks


RANKS = ranked(TEKKEN, 400)


def tekken_file(folder, num_special=20, change=lambda data: None):
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in RANKS.items()
    ]
    specials = [
        {"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(("<unk>", "<s>", "</s>", "[INST]"))
    ]
    config = {
        "pattern": TEKKEN, "num_vocab_tokens": len(vocab), "default_vocab_size": len(vocab) - 10 + num_special,
        "default_num_special_tokens": num_special, "version": "v7",
    }  # fmt: skip
    data = {"config": config, "vocab": vocab, "special_tokens": specials}
    change(data)
    (folder / "tekken.json").write_text(json.dumps(data))
    return folder


def test_tekken(tmp_path):
    tokenizer = Tokenizer.from_directory(tekken_file(tmp_path))
    kept = {token: rank for token, rank in RANKS.items() if rank < len(RANKS) - 10}
    oracle = tiktoken.Encoding("t", pat_str=TEKKEN, mergeable_ranks=kept, special_tokens={})
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == [i + 20 for i in oracle.encode_ordinary(text)]
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.vocab_size) == (1, (2,), len(RANKS) + 10)
    assert tokenizer.encode("a")[0] == 1
    assert tokenizer.id_to_token(19) == "<SPECIAL_19>"
    assert tokenizer.encode("[INST]", parse_special=True) == [1, 3]
    assert tokenizer.encode("[INST]")[1:] != [3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("config"), "no config"),
        (lambda d: d["config"].pop("pattern"), "no pattern"),
        (lambda d: d["config"].update(default_vocab_size="x"), "default_vocab_size is 'x'"),
        (lambda d: d["config"].update(default_vocab_size=10**6), "asks for"),
        (lambda d: d["config"].update(pattern="("), "tekken.json"),
        (lambda d: d["vocab"][5].pop("token_bytes"), "entry 5"),
        (lambda d: d["vocab"][5].update(token_bytes="#"), "not base64"),
        (lambda d: d["vocab"][6].update(token_bytes=d["vocab"][5]["token_bytes"]), "twice"),
        (lambda d: d["special_tokens"].append({"rank": 1, "token_str": "x"}), "cannot be"),
        (lambda d: d.update(special_tokens=5), "no list"),
        (lambda d: d["vocab"].__setitem__(5, None), "entry 5"),
    ],
)
def test_a_damaged_tekken_is_refused_in_a_sentence(tmp_path, change, words):
    with pytest.raises(ValueError, match=words) as error:
        Tokenizer.from_directory(tekken_file(tmp_path, change=change))
    assert "tekken.json of" in str(error.value)


def ranks_file(path):
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in RANKS.items()))


@pytest.mark.parametrize(
    ("name", "model_type", "pattern"),
    [
        ("tiktoken.model", "kimi_k2", KIMI_K2),
        ("tokenizer.model", "llama", LLAMA3),
        ("qwen.tiktoken", "qwen", QWEN2),
    ],
)
def test_ranks(tmp_path, name, model_type, pattern):
    ranks_file(tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    added = {str(len(RANKS) + 3): {"content": "<|named|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    oracle = tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=RANKS, special_tokens={})
    for text in TEXTS:
        if model_type == "qwen" and text != unicodedata.normalize("NFC", text):
            continue  # Qwen's own code composes characters first
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == oracle.encode_ordinary(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.token_to_id("<|named|>") == len(RANKS) + 3
    assert len(tokenizer.special_token_ids) >= 200
    if model_type == "llama":
        assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == len(RANKS)


@pytest.mark.parametrize(
    ("content", "model_type", "words"),
    [
        (b"YQ== 0\n", "martian", "only in the checkpoint's code"),
        (b"YQ== 0\n", "kimi_k2", "255 of the 256"),
        (b"YQ== x\n", "kimi_k2", "line 1"),
        (b"", "kimi_k2", "no tokens"),
        (b"YQ== 99999999999\n", "kimi_k2", "cannot be"),
        (b"YQ== 5\n", "kimi_k2", "up to 5 for 1"),
    ],
)
def test_damaged_ranks_are_refused_in_a_sentence(tmp_path, content, model_type, words):
    (tmp_path / "tiktoken.model").write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=words):
        Tokenizer.from_directory(tmp_path)


def train(**how):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=out, vocab_size=400, byte_fallback=True, hard_vocab_limit=False,
        character_coverage=0.98, minloglevel=2, **how,
    )  # fmt: skip
    return out.getvalue()


@pytest.mark.parametrize(
    "how",
    [
        {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": False},
        {
            "model_type": "bpe",
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": False,
        },
        {"model_type": "unigram", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"},
    ],
    ids=lambda how: "-".join(map(str, how.values())),
)
def test_sentencepiece(tmp_path, how):
    data = train(**how)
    (tmp_path / "tokenizer.model").write_bytes(data)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = Tokenizer.from_directory(tmp_path)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=data)
    for text in TEXTS:
        if "\x00" in text:
            continue  # ends a text in C++
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == oracle.encode(text), text
        if how["normalization_rule_name"] == "identity":
            assert tokenizer.decode(ids) == text
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (oracle.vocab_size(), (2,))
    if how["model_type"] == "bpe":
        assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == 1


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"garbage", b"\x0a\x02\x0a\x00", train(model_type="char")])
def test_a_damaged_sentencepiece_model_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model of .* cannot be read"):
        Tokenizer.from_directory(tmp_path)


def merges_files(folder, tokenizer, **config):
    model = json.loads(tokenizer.hf_json())["model"]
    folder.joinpath("vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    folder.joinpath("merges.txt").write_text("\n".join(lines))
    folder.joinpath("tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_vocabulary_and_merges(tmp_path):
    original = byte_level("gpt2")
    added = {
        str(i): {"content": text, "special": i in original.special_token_ids}
        for text, i in original.added_tokens.items()
    }
    folder = merges_files(
        tmp_path, original, tokenizer_class="GPT2Tokenizer", eos_token="<|im_end|>", added_tokens_decoder=added
    )
    tokenizer = Tokenizer.from_directory(folder)
    for text in TEXTS:
        assert tokenizer.encode(text) == original.encode(text)
    assert tokenizer.eos_token_ids == (2,)


def test_vocabulary_and_merges_of_a_real_model(tmp_path):
    original = real("qwen2_5")
    config = json.loads((real_folder("qwen2_5") / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.from_directory(merges_files(tmp_path, original, **config))
    for text in TEXTS:
        assert tokenizer.encode(text) == original.encode(text)
    assert tokenizer.eos_token_ids == original.eos_token_ids


def test_what_merges_lack_is_said(tmp_path):
    merges_files(tmp_path, byte_level("gpt2"), tokenizer_class="MartianTokenizer")
    with pytest.raises(ValueError, match="MartianTokenizer"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "merges.txt").write_text("a b c\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(ValueError, match=r"line 1 of merges\.txt"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"no merges\.txt"):
        Tokenizer.from_directory(tmp_path)


def test_wordpiece(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fox", "##es", "the", ".", "quick"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("The quick foxes.") == [2, 7, 9, 5, 6, 8, 3]
    assert tokenizer.encode_pair("fox", "the")[1] == [0, 0, 0, 1, 1]
    (tmp_path / "vocab.txt").write_text("fox\n")
    with pytest.raises(ValueError, match=r"\[UNK\], \[CLS\], \[SEP\]"):
        Tokenizer.from_directory(tmp_path)


def test_a_folder_without_any_is_told_what_is_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer: none of tokenizer\.json, tekken\.json"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("name", sorted(set(PRE_TOKENIZERS) - {"whitespace"}))
def test_every_way_to_cut_words_keeps_the_text(name):
    """What is cut and put together again is the text, in whatever way it was cut."""
    if name in ("gemma4", "granite-embed-multi-311m", "sarvam-moe"):
        metadata = {**byte_level_metadata("gpt2"), "tokenizer.ggml.pre": name}
        metadata["tokenizer.ggml.tokens"] = [
            *(f"<0x{i:02X}>" for i in range(256)),
            "\u2581",
            *metadata["tokenizer.ggml.tokens"][257:],
        ]
        metadata["tokenizer.ggml.merges"] = []
        metadata["tokenizer.ggml.token_type"] = [6] * 256 + [1] * (len(metadata["tokenizer.ggml.tokens"]) - 256)
        tokenizer = Tokenizer.from_gguf(metadata)
    else:
        tokenizer = byte_level(name)
    composes = PRE_TOKENIZERS[name].nfc
    for text in TEXTS:
        text = unicodedata.normalize("NFC", text) if composes else text
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("model", "more", "ids"),
    [
        ("whitespace", {}, [5, 2, 4]),
        ("gpt2", {}, [5, 2, 4]),
        ("whitespace", {"unknown_token_id": 0}, [5, 2, 0, 4, 0, 0]),
        ("whitespace", {"normalizer.lowercase": True, "unknown_token_id": 0}, [5, 2, 0, 4, 5]),
        ("whitespace", {"add_bos_token": True, "add_eos_token": True}, [6, 5, 2, 4, 7]),
        ("whitespace", {"add_sep_token": True, "seperator_token_id": 7}, [5, 2, 4, 7]),
    ],
)
def test_words_between_blanks_that_are_no_tokens(model, more, ids):
    """As llama.cpp reads jina-embeddings-v2-base-zh: text in its own letters, blanks dropped, capitals kept unless the file says
    otherwise."""
    metadata = {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": "whitespace",
        "tokenizer.ggml.tokens": ["<unk>", "a", "b", "好", "你好", "ab", "<s>", "</s>", "你"],
        "tokenizer.ggml.token_type": [2, 1, 1, 1, 1, 1, 3, 3, 1],
        "tokenizer.ggml.merges": ["a b", "你 好"],
        "tokenizer.ggml.bos_token_id": 6,
        "tokenizer.ggml.eos_token_id": 7,
    }
    metadata |= {f"tokenizer.ggml.{name}": value for name, value in more.items()}
    assert Tokenizer.from_gguf(metadata).encode(" ab\u3000b\n \tx你好  AB ", add_special_tokens=True) == ids


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("kimi-k2", "漢字abc 12345'", ["漢字", "abc", " ", "123", "45", "'"]),
        ("superbpe", "a 1234567", ["a ", "1", "234", "567"]),
        ("afmoe", "x12345", ["x", "12", "345"]),
        ("tiny_aya", "12345 a", ["12", "345", " a"]),
        ("seed-coder", "a1 !!\n", ["a", "1", " !!", "\n"]),
        ("bailingmoe", "don't\n\n", ["don", "'t", "\n\n"]),
        ("bloom", "a b, c", ["a", " b", ",", " c"]),
        ("viking", "ab12", ["ab", "1", "2"]),
        ("deepseek-llm", "Ab 漢1234 !x", ["Ab", " ", "漢", "1234", " !", "x"]),
        ("exaone-moe", "a b c1", ["a b c", "1"]),
        ("laguna", "a\n\nb c", ["a", "\n\n", "b", " c"]),
        ("minicpm5", "x1234", ["x", "123", "4"]),
        ("youtu", "한글 ab1", ["한글", " ab", "1"]),
        ("ufakzeka", "Ankara'nın", ["Ankara", "'nın"]),
        ("falcon-h1", "a1234", ["a", "123", "4"]),
        ("hy_v4", "漢字 a1234 .b\n", ["漢字", " a", "123", "4", " .", "b", "\n"]),
        ("spark2_5", "漢字 a1234 .\n\n", ["漢字", " a", "1", "2", "3", "4", " .", "\n", "\n"]),
        ("jais-2", "a" + " " * 14 + "b1234", ["a", " " * 8, " " * 4, " ", " b", "123", "4"]),
        ("k2-horizon", "می\u200cخواهم x\u0301y1234", ["می\u200cخواهم", " x\u0301y", "123", "4"]),
    ],
)
def test_words(name, text, words):
    found = PRE_TOKENIZERS[name].build().pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in found] == words
