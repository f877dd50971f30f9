"""Keeps what a user typed from becoming a control token.

A chat template concatenates the model's control tokens and the user's strings into one text. Before that, every
string from outside is marked wherever it spells a control token, or could be one half of one: a private character
that no control token contains is put inside. Afterwards the control tokens that can still be read in the rendered
text are the template's own; the marks are taken out and what they broke stays text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken

# Noncharacters: Unicode reserves them for use inside a program, never for interchange (Unicode Standard, 23.7).
PLACEHOLDER = "\ufdd0"  # stands for a control token while a marked chat is encoded
MARK = "\ufdd1"
_RESERVED = str.maketrans({PLACEHOLDER: "\ufffd", MARK: "\ufffd"})

# A beginning of a control token this long is marked wherever it stands, shorter ones only at the end of a string,
# where the next string may complete it. Three characters: `</t` is too common in prose to break, and a template that
# looks for `</think>` in a message must find it.
_MIN_PREFIX = 3


class ControlTokenGuard:
    """Marks the strings that go into one chat template, and encodes what comes out of it.

    Args:
        tokenizer: reads every added token in a text, control tokens included.
        template_source: the template. Added tokens that are not control tokens (`<tool_call>`) but that it writes are
            its structure: in what users and tools say they are text too.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, template_source: str = "") -> None:
        added = tokenizer.get_added_tokens_decoder()
        control = {token.content: i for i, token in added.items() if token.special}
        structural = {
            token.content: i
            for i, token in added.items()
            if not token.special and len(token.content) > 2 and token.content in template_source
        }
        self._ids = control | structural
        self._find = _any_of(self._ids)
        self._control = _Matcher(control)
        self._all = _Matcher(self._ids) if structural else self._control
        self._parsing = tokenizer
        self._marked = sibling(tokenizer, structural)
        self._marked.add_tokens([AddedToken(PLACEHOLDER, normalized=False, special=False)])
        self._placeholder_id = self._marked.token_to_id(PLACEHOLDER)

    def mark(self, value: Any, strict: bool = False) -> Any:
        """A copy of `value` (strings, lists, mappings, scalars) with every string in it marked where needed.

        Args:
            strict: mark the template's structural tokens too.
        """
        return _map_strings(value, (self._all if strict else self._control).mark)

    def mark_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """`mark` for a chat: strict for what users and tools say, since a system prompt may show the model a tool call
        and an assistant's earlier turns hold real ones."""
        return [self.mark(message, message.get("role") in ("user", "tool")) for message in messages]

    def encode(self, rendered: str) -> list[int]:
        """Token ids of a rendered chat: the template's control tokens are control tokens, the user's are text.

        Where nothing was marked these are the ids of the library's own `encode`.
        """
        rendered = clean_unicode(rendered)
        if MARK not in rendered:
            return self._parsing.encode_batch_fast([rendered], add_special_tokens=False)[0].ids
        real: list[int] = []

        def stand_in(match: re.Match[str]) -> str:
            real.append(self._ids[match[0]])
            return PLACEHOLDER

        # A placeholder keeps what stands behind a control token from looking like the start of a text, which some
        # tokenizers treat differently. So one call encodes the whole chat.
        text = self._find.sub(stand_in, rendered).replace(MARK, "")
        ids = iter(real)
        found = self._marked.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return [next(ids) if token == self._placeholder_id else token for token in found]


def sibling(tokenizer: tokenizers.Tokenizer, as_control: Container[str] = ()) -> tokenizers.Tokenizer:
    """A tokenizer that takes control tokens for text, and those in `as_control` too.

    It shares the vocabulary with `tokenizer`: with 262,000 tokens it costs 12 ms and no memory.
    """
    added = tokenizer.get_added_tokens_decoder()
    other = tokenizers.Tokenizer(tokenizer.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(tokenizer, part) is not None:
            setattr(other, part, getattr(tokenizer, part))
    other.add_tokens([_copy(added[i], as_control) for i in sorted(added)])
    if other.get_added_tokens_decoder().keys() != added.keys():
        raise ValueError("The tokenizer's added tokens have gaps between their ids; it cannot be used for chats.")
    other.encode_special_tokens = True
    return other


def _copy(token: AddedToken, as_control: Container[str]) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special or token.content in as_control,
    )


def unmark(rendered: str) -> str:
    """`rendered` as a person should see it."""
    return rendered.replace(MARK, "")


def clean_unicode(text: str) -> str:
    """`text` without lone surrogates, which JSON can carry but UTF-8 cannot: they become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", errors="replace")
    return text


class _Matcher:
    """Finds control tokens and beginnings of them in a string."""

    def __init__(self, tokens: Iterable[str]) -> None:
        tokens = list(tokens)
        self._whole = _any_of(tokens)
        prefixes = {token[:n] for token in tokens for n in range(1, len(token))}
        long = {token[:_MIN_PREFIX] for token in tokens if len(token) > _MIN_PREFIX}
        self._inside = _any_of(long)
        self._prefixes = prefixes
        self._longest = max(map(len, prefixes), default=0)
        self._firsts = {token[0] for token in tokens if token}

    def mark(self, text: str) -> str:
        if not self._firsts:
            return text
        text = text.translate(_RESERVED) if PLACEHOLDER in text or MARK in text else text
        text = self._whole.sub(_break, text)
        text = self._inside.sub(_break, text)
        body = text.rstrip()
        tail = body[-self._longest :]
        if any(tail[i:] in self._prefixes for i in range(len(tail)) if tail[i] in self._firsts):
            text = body + MARK + text[len(body) :]
        return text


def _break(match: re.Match[str]) -> str:
    return match[0][:1] + MARK + match[0][1:]


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted((token for token in tokens if token), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(k) if isinstance(k, str) else k: _map_strings(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value
