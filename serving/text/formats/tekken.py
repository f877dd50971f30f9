"""`tekken.json`: the tokenizer files of Mistral's models that come without a tokenizer.json.

The layout is that of mistral-common's `Tekkenizer`: a pattern, tokens by rank as base64, and special tokens that take the
first ids. Of the tokens in the file the vocabulary has as many as `default_vocab_size` leaves.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from serving.text.formats import ranks
from serving.text.formats.pieces import set_template

BOS, EOS = "<s>", "</s>"
# Of files older than the list of special tokens in them: mistral-common's fallback.
_OLD_SPECIALS = (
    *("<unk>", BOS, EOS, "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


def read(path: Path) -> Tokenizer:
    """The tokenizer, with a BOS in front of texts.

    Raises:
        ValueError: the file is damaged; the rest of a sentence about it.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    config = _mapping(data, "config")
    num_special = _count(config, "default_num_special_tokens")
    size = _count(config, "default_vocab_size")
    pattern = config.get("pattern")
    if not isinstance(pattern, str):
        raise ValueError("its config has no pattern.")
    specials = _specials(data.get("special_tokens"), num_special)
    tokenizer = ranks.build(_ranks(data.get("vocab"), size - num_special), pattern, num_special, before=specials)
    ranks.add_specials(tokenizer, specials)
    set_template(tokenizer, specials.get(BOS), None)
    return tokenizer


def _ranks(vocab: Any, wanted: int) -> dict[bytes, int]:
    if not isinstance(vocab, list) or len(vocab) < wanted or wanted < 256:
        found = len(vocab) if isinstance(vocab, list) else 0
        raise ValueError(f"its vocab has {found} tokens where its config asks for {wanted}.")
    found_ranks: dict[bytes, int] = {}
    for i, entry in enumerate(vocab[:wanted]):
        text = entry.get("token_bytes") if isinstance(entry, Mapping) else None
        if not isinstance(text, str) or entry.get("rank", i) != i:
            raise ValueError(f"entry {i} of its vocab has no token_bytes, or a rank that is not {i}.")
        try:
            token = base64.b64decode(text, validate=True)
        except binascii.Error:
            raise ValueError(f"entry {i} of its vocab is not base64.") from None
        if not token or token in found_ranks:
            raise ValueError(f"entry {i} of its vocab is empty or there twice.")
        found_ranks[token] = i
    return found_ranks


def _specials(given: Any, count: int) -> dict[str, int]:
    """Special tokens by id, with fillers up to their number as mistral-common names them."""
    names: dict[int, str] = {}
    if given is None:
        names = dict(enumerate(_OLD_SPECIALS[:count]))
    elif not isinstance(given, list):
        raise ValueError("its special_tokens are no list.")
    for entry in given or ():
        rank = entry.get("rank") if isinstance(entry, Mapping) else None
        text = entry.get("token_str") if isinstance(entry, Mapping) else None
        if not isinstance(text, str) or not isinstance(rank, int) or not 0 <= rank < count or rank in names:
            raise ValueError(f"its special_tokens have an entry that cannot be: {json.dumps(entry)[:60]}.")
        names[rank] = text
    found = {names.get(i, f"<SPECIAL_{i}>"): i for i in range(count)}
    if len(found) != count:
        raise ValueError("its special_tokens have a name twice.")
    return found


def _mapping(data: Any, name: str) -> Mapping[str, Any]:
    value = data.get(name) if isinstance(data, Mapping) else None
    if not isinstance(value, Mapping):
        raise ValueError(f"it has no {name}.")
    return value


def _count(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 24:
        raise ValueError(f"its config's {name} is {value!r}.")
    return value
