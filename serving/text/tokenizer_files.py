"""The tokenizer's files in a Hugging Face model folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from serving.text.formats import older, sentencepiece_model, tekken, tiktoken_model


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
    """Reads tokenizer.json and the files beside it; without one, the vocabulary files that other libraries write.

    Whether a text gets a BOS is what tokenizer.json says; `add_bos_token` in tokenizer_config.json has no effect where
    there is a tokenizer.json, as in transformers.

    Raises:
        ValueError: a file is missing or damaged; the sentence names it.
    """
    found = next((name for name in _READERS if any(folder.glob(name))), None)
    if found is None:
        raise ValueError(f"{folder.name} has no tokenizer: none of {', '.join(_READERS)}.")
    path = next(iter(sorted(folder.glob(found))))
    try:
        tokenizer = _READERS[found](path)
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # the library raises bare Exception, and where its Rust code panics no Exception at all
        said = str(error).strip() or type(error).__name__
        raise ValueError(f"{path.name} of {folder.name} cannot be read: {said}") from None
    try:
        return _with_settings(folder, tokenizer, bare=found != "tokenizer.json")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"a file beside {path.name} of {folder.name} has an entry that is missing or of a wrong type: {error}."
        ) from error


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder has a tokenizer to read."""
    return any(any(folder.glob(name)) for name in _READERS)


def chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a folder by name, the usual one as "default"; whether it has a vocabulary or not.

    Raises:
        ValueError: a file that is damaged; the sentence names it.
    """
    return _chat_templates(folder, _json(folder / "tokenizer_config.json"))


def _read_json(path: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(path))


def _read_ranks(path: Path) -> tokenizers.Tokenizer:
    return tiktoken_model.read(path, _json(path.parent / "tokenizer_config.json"), _model_type(path.parent))


def _read_model(path: Path) -> tokenizers.Tokenizer:
    if tiktoken_model.is_ranks(path):  # Llama 3's original files have this name too
        return _read_ranks(path)
    return sentencepiece_model.read(path, _json(path.parent / "tokenizer_config.json"))


def _read_merges(path: Path) -> tokenizers.Tokenizer:
    folder = path.parent
    if not (folder / "merges.txt").is_file():
        raise ValueError("there is no merges.txt beside it.")
    return older.read_merges(folder, _json(folder / "tokenizer_config.json"), _model_type(folder))


def _read_wordpiece(path: Path) -> tokenizers.Tokenizer:
    return older.read_wordpiece(path, _json(path.parent / "tokenizer_config.json"))


def _model_type(folder: Path) -> str:
    found = _json(folder / "config.json").get("model_type")
    return found if isinstance(found, str) else ""


# In the order in which they are looked for.
_READERS: dict[str, Callable[[Path], tokenizers.Tokenizer]] = {
    "tokenizer.json": _read_json,
    "tekken.json": tekken.read,
    "tiktoken.model": _read_ranks,
    "*.tiktoken": _read_ranks,
    "tokenizer.model": _read_model,
    "vocab.json": _read_merges,
    "vocab.txt": _read_wordpiece,
}

# What ends a text or a turn, where no file beside the vocabulary says so.
_ENDS = ("</s>", "<|end_of_text|>", "<|eot_id|>", "<|endoftext|>", "<|im_end|>", "[EOS]", "[SEP]")


def _with_settings(folder: Path, tokenizer: tokenizers.Tokenizer, bare: bool) -> TokenizerFiles:
    """What the files beside the vocabulary add.

    Args:
        bare: the vocabulary is not a tokenizer.json: what the files beside it leave open goes by names.
    """
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
    if bare and not ends:
        specials_known = tokenizer.get_added_tokens_decoder()
        known = {token.content: i for i, token in specials_known.items() if token.special}
        ends = dict.fromkeys(known[name] for name in _ENDS if name in known)
    return TokenizerFiles(
        tokenizer,
        tuple(ends),
        named("bos") or (_leading(tokenizer) if bare else None),
        named("unk"),
        named("pad"),
        _chat_templates(folder, config),
    )


def _leading(tokenizer: tokenizers.Tokenizer) -> str | None:
    """The token that the tokenizer itself puts before a text, where no file names the BOS."""
    ids = tokenizer.encode("").ids
    return tokenizer.id_to_token(ids[0]) if ids else None


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
