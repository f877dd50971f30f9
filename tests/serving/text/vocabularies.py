"""Small tokenizers of the kinds that models have, made in milliseconds, and where the real ones are cached."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import platformdirs
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from serving.text.tokenizer import Tokenizer

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN_ADDED = ("<tool_call>", "</tool_call>", "<think>", "</think>")
CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    'def f(x):\n    return {"name": x, "arguments": [1, 2.5, null, true]}\n',
    "512 of 512 or 512 " * 9,
    "Grüße aus Köln, où l'été est là. 你好，世界 😀 don't won't I'm",
    '{"city": "Paris", "unit": "celsius"} <tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>',
]
NORMAL, UNKNOWN, CONTROL_TYPE, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@functools.cache
def byte_level_metadata(pre: str = "smollm", size: int = 600) -> dict:
    """GGUF metadata of a byte-level BPE trained on CORPUS: control tokens first, other added tokens last."""
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trained.train_from_iterator(CORPUS, trainer)
    pieces = [token for token, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    tokens = [*CONTROL, *pieces, *PLAIN_ADDED, "[unused]"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL_TYPE] * 3
        + [NORMAL] * len(pieces)
        + [USER_DEFINED] * len(PLAIN_ADDED)
        + [UNUSED],
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in _merges(trained)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }


@functools.cache
def sentencepiece_metadata(prefix: bool = True) -> dict:
    """GGUF metadata of a SentencePiece BPE with byte fallback, its scores the negative merge ranks."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix else "never")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    pieces = [token for token, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    joined = {a + b: rank for rank, (a, b) in enumerate(_merges(trained))}
    rare = {"你", "😀"}  # left to the byte tokens
    pieces = [piece for piece in pieces if not rare & set(piece)]
    head = ["<unk>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>"]
    tokens = [*head, *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [UNKNOWN, *[CONTROL_TYPE] * 4, *[BYTE] * 256, *[NORMAL] * len(pieces)],
        "tokenizer.ggml.scores": [0.0] * 261 + [-float(joined.get(piece, 100_000)) for piece in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _merges(tokenizer: tokenizers.Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


@functools.cache
def byte_level(pre: str = "smollm") -> Tokenizer:
    return Tokenizer.from_gguf(byte_level_metadata(pre))


@functools.cache
def sentencepiece(prefix: bool = True) -> Tokenizer:
    return Tokenizer.from_gguf(sentencepiece_metadata(prefix))


REAL = (
    "qwen3",
    "qwen2_5",
    "llama3_1",
    "llama3_2",
    "llama2",
    "gemma2",
    "gemma3",
    "deepseek_v3",
    "mistral_nemo",
    "gptoss",
)


def real_folder(name: str) -> Path:
    """A tokenizer that scripts/fetch_tokenizers.py put into the user's cache; skips the test without it."""
    base = os.environ.get("JAXSERVE_CACHE") or platformdirs.user_cache_dir("jaxserve")
    folder = Path(base) / "tokenizers" / name
    if not (folder / "tokenizer_config.json").exists():
        pytest.skip(f"the tokenizer {name} is not in the cache: run scripts/fetch_tokenizers.py {name}")
    return folder


@functools.cache
def real(name: str) -> Tokenizer:
    return Tokenizer.from_directory(real_folder(name))
