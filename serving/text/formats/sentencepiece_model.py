"""SentencePiece's `tokenizer.model`: BPE and unigram vocabularies, with the model's own rules for blanks.

The file is a protocol buffer (sentencepiece_model.proto, google/sentencepiece). The few fields that matter are declared
here, for the library that gRPC brings along.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
from tokenizers import Tokenizer, normalizers

from serving.text.formats import gguf_vocab
from serving.text.formats.pieces import TokenType, set_template
from serving.text.formats.unigram import charsmap, unigram

UNIGRAM, BPE = 1, 2
_FIELD = descriptor_pb2.FieldDescriptorProto


def read(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer, with BOS and EOS around texts as `tokenizer_config.json` says (Llama's: a BOS).

    Args:
        config: tokenizer_config.json, or empty.
    Raises:
        ValueError: the file is damaged, or of a kind that is not known; the rest of a sentence about it.
    """
    model = _model_class()()
    try:
        model.ParseFromString(path.read_bytes())
    except message.DecodeError:
        raise ValueError("it is not a SentencePiece model.") from None
    if not any(piece.type == TokenType.UNKNOWN for piece in model.pieces):
        raise ValueError("it has no piece for what is unknown: it is not a SentencePiece model.")
    trainer, rules = model.trainer_spec, model.normalizer_spec
    tokens = [piece.piece for piece in model.pieces]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [piece.score for piece in model.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in model.pieces],
        "tokenizer.ggml.add_space_prefix": rules.add_dummy_prefix and config.get("add_prefix_space") is not False,
        "tokenizer.ggml.unknown_token_id": trainer.unk_id,
    }
    before = charsmap(rules.precompiled_charsmap, rules.name)
    if trainer.model_type == BPE:
        tokenizer = gguf_vocab.build({**metadata, "tokenizer.ggml.add_bos_token": False})
        if before:
            steps = [step for step in (*before, tokenizer.normalizer) if step is not None]
            tokenizer.normalizer = normalizers.Sequence(steps)
    elif trainer.model_type == UNIGRAM:
        tokenizer = unigram(metadata, before, rules.remove_extra_whitespaces)
    else:
        raise ValueError(f"its model type is {trainer.model_type}; 1 (unigram) and 2 (BPE) can be read.")
    count = len(tokens)
    bos = (
        trainer.bos_id
        if 0 <= trainer.bos_id < count and config.get("add_bos_token", trainer.model_type == BPE)
        else None
    )
    eos = trainer.eos_id if 0 <= trainer.eos_id < count and config.get("add_eos_token") else None
    set_template(tokenizer, bos, eos)
    return tokenizer


@functools.cache
def _model_class() -> Any:
    """The message class of a model file, with the fields that are read."""
    file = descriptor_pb2.FileDescriptorProto(
        name="jaxserve_sentencepiece.proto", package="jaxserve.sentencepiece", syntax="proto2"
    )
    kinds = {"string": _FIELD.TYPE_STRING, "float": _FIELD.TYPE_FLOAT, "int32": _FIELD.TYPE_INT32,
             "bool": _FIELD.TYPE_BOOL, "bytes": _FIELD.TYPE_BYTES}  # fmt: skip
    declared = {
        "Piece": (("piece", 1, "string", None), ("score", 2, "float", None), ("type", 3, "int32", "1")),
        "Trainer": (("model_type", 3, "int32", "1"), ("unk_id", 40, "int32", "0"), ("bos_id", 41, "int32", "1"),
                    ("eos_id", 42, "int32", "2")),
        "Normalizer": (("name", 1, "string", None), ("precompiled_charsmap", 2, "bytes", None),
                       ("add_dummy_prefix", 3, "bool", "true"), ("remove_extra_whitespaces", 4, "bool", "true")),
    }  # fmt: skip
    for name, fields in declared.items():
        made = file.message_type.add(name=name)
        for field, number, kind, default in fields:
            made.field.add(
                name=field, number=number, type=kinds[kind], label=_FIELD.LABEL_OPTIONAL, default_value=default
            )
    top = file.message_type.add(name="Model")
    for field, number, kind in (
        ("pieces", 1, "Piece"),
        ("trainer_spec", 2, "Trainer"),
        ("normalizer_spec", 3, "Normalizer"),
    ):
        label = _FIELD.LABEL_REPEATED if field == "pieces" else _FIELD.LABEL_OPTIONAL
        top.field.add(
            name=field,
            number=number,
            type=_FIELD.TYPE_MESSAGE,
            label=label,
            type_name=f".jaxserve.sentencepiece.{kind}",
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("jaxserve.sentencepiece.Model"))
