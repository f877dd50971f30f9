"""Rerankers that answer: decoders that are asked whether a document meets a query, and whose score is how much likelier they answer
"yes" than "no" (Qwen3-Reranker, https://arxiv.org/abs/2506.05176). How they are asked: `serving/text/question.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NAMED = re.compile(r"qwen3.*reranker", re.IGNORECASE)
_DECODER, _CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
WORDS = ("no", "yes")


def words_of(hf: Mapping[str, Any], name: str) -> tuple[str, str] | None:
    """The tokens that such a model answers with, the one against first; None for any other model.

    It is one where config.json has `classifier_from_token` (vLLM's name), or where a Qwen 3 decoder is called a reranker: their
    files have nothing that says so.

    Args:
        name: of the checkpoint: a hub id, or a folder's.
    Raises:
        ValueError: `classifier_from_token` is not two tokens.
    """
    told = hf.get("classifier_from_token")
    if told is not None:
        if not (isinstance(told, list | tuple) and len(told) == 2 and all(isinstance(one, str) for one in told)):
            raise ValueError(f"config.json: classifier_from_token is {told!r}; give two tokens, the one against first.")
        return told[0], told[1]
    own = hf.get("architectures") == [f"Qwen3{_DECODER}"] and _NAMED.search(name.rpartition("/")[2])
    return WORDS if own else None


def as_classifier(hf: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """A configuration as a classifier's of one label, with the ids of the tokens that it answers with as `answers`; any other
    model's as it is.

    Raises:
        ValueError: as `words_of`, or a word is no token of the vocabulary.
    """
    words = words_of(hf, name)
    if words is None:
        return hf
    architecture = hf["architectures"][0]
    if architecture.endswith(_DECODER):
        architecture = architecture.removesuffix(_DECODER) + _CLASSIFIER
    own = {"architectures": [architecture], "id2label": {"0": words[1]}, "answers": _ids(folder, words)}
    return {key: value for key, value in hf.items() if key not in ("label2id", "num_labels")} | own


def _ids(folder: Path, words: tuple[str, str]) -> list[int]:
    path = folder / "tokenizer.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    vocab = known.get("model", {}).get("vocab", {})
    missing = [word for word in words if not isinstance(vocab, dict) or word not in vocab]
    if missing:
        raise ValueError(
            f"{folder.name} answers with the tokens {' and '.join(map(repr, words))}, and tokenizer.json has no {missing[0]!r}."
        )
    return [int(vocab[word]) for word in words]
