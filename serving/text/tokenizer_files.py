"""The tokenizer's files in a Hugging Face model folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """What a model folder says about its tokenizer."""

    tokenizer: tokenizers.Tokenizer
    eos_token_ids: tuple[int, ...]
    bos_token: str | None
    unk_token: str | None
    pad_token: str | None
    chat_templates: dict[str, str]


def read(folder: Path) -> TokenizerFiles:
    """Reads tokenizer.json and the files beside it.

    Whether a text gets a BOS is what tokenizer.json says; `add_bos_token` in tokenizer_config.json has no effect where
    there is a tokenizer.json, as in transformers.

    Raises:
        ValueError: a file is missing or damaged; the sentence names it.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        other = (
            " A tokenizer.model alone cannot be read: save the model's fast tokenizer."
            if (folder / "tokenizer.model").exists()
            else ""
        )
        raise ValueError(f"{folder.name} has no tokenizer.json.{other}")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # the library raises bare Exception, and where its Rust code panics no Exception at all
        raise ValueError(f"tokenizer.json of {folder.name} cannot be read: {error}") from None
    try:
        return _with_settings(folder, tokenizer)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"a file beside tokenizer.json of {folder.name} has an entry that is missing or of a wrong type: {error}."
        ) from error


def _with_settings(folder: Path, tokenizer: tokenizers.Tokenizer) -> TokenizerFiles:
    """What the files beside tokenizer.json add."""
    config = _json(folder / "tokenizer_config.json")
    specials = _json(folder / "special_tokens_map.json")

    def named(name: str) -> str | None:
        token = config.get(f"{name}_token", specials.get(f"{name}_token"))
        token = token.get("content") if isinstance(token, Mapping) else token
        return token if isinstance(token, str) else None

    _add_missing(tokenizer, config)
    eos = named("eos")
    ends: dict[int, None] = {}
    if eos is not None and (token := tokenizer.token_to_id(eos)) is not None:
        ends[token] = None
    for source in (_json(folder / "generation_config.json"), _json(folder / "config.json")):
        value = source.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int):
                ends[token] = None
    return TokenizerFiles(
        tokenizer, tuple(ends), named("bos"), named("unk"), named("pad"), _chat_templates(folder, config)
    )


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Files win over the entry in tokenizer_config.json, as in transformers."""
    found: dict[str, str] = {}
    entry = config.get("chat_template")
    if isinstance(entry, str):
        found["default"] = entry
    elif isinstance(entry, list):
        found.update({t["name"]: t["template"] for t in entry if isinstance(t, Mapping) and "template" in t})
    old = _json(folder / "chat_template.json").get("chat_template")
    if isinstance(old, str):
        found["default"] = old
    if (path := folder / "chat_template.jinja").is_file():
        found["default"] = path.read_text(encoding="utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = path.read_text(encoding="utf-8")
    return found


def _add_missing(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Tokens that only tokenizer_config.json lists (`added_tokens_decoder`), in the order of their ids."""
    listed = config.get("added_tokens_decoder") or {}
    for token_id, token in sorted((int(i), token) for i, token in listed.items()):
        if tokenizer.token_to_id(token["content"]) is not None:
            continue
        flags = {k: bool(token.get(k)) for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        tokenizer.add_tokens([AddedToken(token["content"], **flags)])
        if tokenizer.token_to_id(token["content"]) != token_id:
            raise ValueError(f"tokenizer_config.json gives {token['content']!r} the id {token_id}, which is taken.")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} of {path.parent.name} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path.name} of {path.parent.name} is not a JSON object.")
    return data
