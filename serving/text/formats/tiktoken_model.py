"""`tiktoken.model` and its like: a token a line, as base64, and its rank (Kimi, Moonlight, Llama 3's original files, Qwen).

Such a file says neither how text is cut nor what the special tokens are: the checkpoint's Python code does, which is not
run. So the families that are known have their patterns here, and the special tokens are those that
tokenizer_config.json lists.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from serving.text.formats import ranks
from serving.text.formats.pieces import set_template
from serving.text.formats.pretokenizers import KIMI_K2, LLAMA3, QWEN2

MAX_TOKENS = 1 << 22


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What one family's code adds to its file.

    Attributes:
        reserved: special tokens behind the vocabulary, in all.
        filler: the name of one that has none; `{}` is its number.
        filler_from: the number of the first of them, counted behind the vocabulary.
        named: by place behind the vocabulary.
    """

    pattern: str
    reserved: int
    filler: str
    named: Mapping[int, str] = dataclasses.field(default_factory=dict)
    nfc: bool = False
    bos: str | None = None


_KIMI = _Kind(KIMI_K2, 256, "<|reserved_token_{id}|>")
_LLAMA3 = _Kind(
    LLAMA3,
    256,
    "<|reserved_special_token_{number}|>",
    {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>",
     7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>"},
    bos="<|begin_of_text|>",
)  # fmt: skip
_QWEN = _Kind(QWEN2, 208, "<|extra_{number}|>", {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"}, nfc=True)


def read(path: Path, config: Mapping[str, Any], model_type: str) -> Tokenizer:
    """The tokenizer.

    Args:
        config: tokenizer_config.json, or empty.
        model_type: config.json's.
    Raises:
        ValueError: the file is damaged, or how its text is cut is not known; the rest of a sentence about it.
    """
    kind = _kind(path, config, model_type)
    found = _ranks(path)
    size = max(found.values()) + 1
    if size != len(found):
        raise ValueError(f"its ranks go up to {size - 1} for {len(found)} tokens.")
    tokenizer = ranks.build(found, kind.pattern, nfc=kind.nfc)
    listed = config.get("added_tokens_decoder")
    given = {int(i): token["content"] for i, token in listed.items()} if isinstance(listed, Mapping) else {}
    plain = {t["content"] for t in listed.values() if not t.get("special", True)} if isinstance(listed, Mapping) else ()
    names: dict[str, int] = {}
    number = 0
    for place in range(kind.reserved):
        token = size + place
        name = given.get(token) or kind.named.get(place)
        if name is None:
            name = kind.filler.format(id=token, number=number)
            number += 1
        names[name] = token
    ranks.add_specials(tokenizer, names, plain)
    if kind.bos is not None:
        set_template(tokenizer, tokenizer.token_to_id(kind.bos), None)
    return tokenizer


def is_ranks(path: Path) -> bool:
    """Whether a file looks like one of these, and not like a protocol buffer."""
    with path.open("rb") as file:
        token, _, rank = file.readline(2048).strip().partition(b" ")
    try:
        base64.b64decode(token, validate=True)
    except binascii.Error:
        return False
    return bool(token) and rank.isdigit()


def _kind(path: Path, config: Mapping[str, Any], model_type: str) -> _Kind:
    called = f"{config.get('tokenizer_class', '')} {model_type}".lower()
    if path.name.endswith(".tiktoken") or "qwen" in called:
        return _QWEN
    if "llama" in called or "mllama" in called:
        return _LLAMA3
    if "tiktokentokenizer" in called or any(name in called for name in ("kimi", "moonlight", "deepseek_v3")):
        return _KIMI
    raise ValueError(
        "how its text is cut into words is not known for this model: it is only in the checkpoint's code. Name a folder "
        "with a tokenizer.json with --tokenizer."
    )


def _ranks(path: Path) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            token, _, rank = line.strip().partition(b" ")
            if not token and not rank:
                continue
            try:
                found[base64.b64decode(token, validate=True)] = int(rank)
            except (binascii.Error, ValueError):
                raise ValueError(f"line {number} is not a token in base64 and its rank.") from None
            if number > MAX_TOKENS:
                raise ValueError(f"it has more than {MAX_TOKENS} tokens.")
    if not found or min(found.values()) < 0 or max(found.values()) >= MAX_TOKENS or b"" in found:
        raise ValueError("it has no tokens, an empty one, or a rank that cannot be.")
    return found
