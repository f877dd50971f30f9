"""Vocabulary files that are no tokenizer.json: what is wrong with them is a ValueError, and what is not tokenizes."""

from __future__ import annotations

import base64
import json
import pathlib
import random
from collections.abc import Callable, Iterable
from typing import Any

from tests.fuzz.mutate import mutate_bytes, mutate_json
from tests.fuzz.run import Case

CONFIG = {"model_type": "kimi_k2", "eos_token_id": 2}
SETTINGS = {
    "tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "add_prefix_space": False, "add_bos_token": True,
    "added_tokens_decoder": {"270": {"content": "<|x|>", "special": True}},
}  # fmt: skip
TOKENS = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"hell", b" w"]


def _case(folder: pathlib.Path, write: Callable[[random.Random], None]) -> Case:
    from serving.text.tokenizer import Tokenizer

    def case(rng: random.Random) -> Iterable[str]:
        (folder / "config.json").write_text(json.dumps(mutate_json(rng, CONFIG) if rng.random() < 0.2 else CONFIG))
        settings = mutate_json(rng, SETTINGS) if rng.random() < 0.4 else SETTINGS
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        write(rng)
        try:
            tokenizer = Tokenizer.from_directory(folder)
        except ValueError as error:
            return [str(error)]
        try:
            tokenizer.decode(tokenizer.encode("Hello <|x|> wörld"))
        except BaseException as error:  # as with tokenizer.json: ends one request
            if type(error).__name__ != "PanicException":
                raise
        return []

    return case


def ranks(folder: pathlib.Path) -> Case:
    """tekken.json and tiktoken.model."""
    vocab = [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for i, token in enumerate(TOKENS)]
    config = {"pattern": r"\s*\w+|.", "default_vocab_size": len(TOKENS) + 8, "default_num_special_tokens": 8}
    tekken = {"config": config, "vocab": vocab, "special_tokens": [{"rank": 1, "token_str": "<s>", "is_control": True}]}
    lines = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(TOKENS))

    def write(rng: random.Random) -> None:
        for name in ("tekken.json", "tiktoken.model"):
            (folder / name).unlink(missing_ok=True)
        if rng.random() < 0.5:
            text = json.dumps(mutate_json(rng, tekken, 2) if rng.random() < 0.8 else tekken).encode()
            (folder / "tekken.json").write_bytes(mutate_bytes(rng, text, 2) if rng.random() < 0.3 else text)
        else:
            (folder / "tiktoken.model").write_bytes(mutate_bytes(rng, lines, 3) if rng.random() < 0.9 else lines)

    return _case(folder, write)


def pieces(folder: pathlib.Path) -> Case:
    """SentencePiece models."""
    from serving.text.formats.sentencepiece_model import _model_class

    def model(kind: int) -> bytes:
        made: Any = _model_class()()
        given = [
            ("<unk>", 2),
            ("<s>", 3),
            ("</s>", 3),
            *((f"<0x{i:02X}>", 6) for i in range(256)),
            ("▁", 1),
            ("h", 1),
            ("▁h", 1),
        ]
        for i, (text, type_) in enumerate(given):
            made.pieces.add(piece=text, score=-float(i), type=type_)
        made.trainer_spec.model_type = kind
        return made.SerializeToString()

    models = [model(kind) for kind in (1, 2)]

    def write(rng: random.Random) -> None:
        data = rng.choice(models)
        (folder / "tokenizer.model").write_bytes(mutate_bytes(rng, data, 3) if rng.random() < 0.95 else data)

    return _case(folder, write)


def merges(folder: pathlib.Path) -> Case:
    """vocab.json with merges.txt."""
    from serving.text.formats.ranks import spelt

    vocab = {spelt(token): i for i, token in enumerate(TOKENS)}
    text = b"#version: 0.2\nh e\nl l\nhe ll\n"

    def write(rng: random.Random) -> None:
        (folder / "vocab.json").write_text(json.dumps(mutate_json(rng, vocab, 2) if rng.random() < 0.5 else vocab))
        (folder / "merges.txt").write_bytes(mutate_bytes(rng, text, 2) if rng.random() < 0.6 else text)

    return _case(folder, write)


TARGETS = {"ranks": ranks, "pieces": pieces, "merges": merges}
