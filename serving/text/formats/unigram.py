"""Unigram vocabularies (T5's kind), whichever file they come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from serving.text.formats.pieces import SPACE, TokenType


def unigram(metadata: Mapping[str, Any], before: Sequence[Any], trims: bool) -> Tokenizer:
    """A unigram vocabulary (T5's kind), from metadata in GGUF's keys.

    Args:
        before: normalizers that come first (`charsmap`).
        trims: blanks at the ends are dropped, and of several in a row all but one.
    """
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    types: Sequence[int] = metadata["tokenizer.ggml.token_type"]
    scores: Sequence[float] = metadata["tokenizer.ggml.scores"]
    unknown = int(metadata.get("tokenizer.ggml.unknown_token_id", 0))
    if not 0 <= unknown < len(tokens):
        raise ValueError(f"the unknown token is {unknown}, outside of the {len(tokens)} tokens.")
    falls_back = any(kind == TokenType.BYTE for kind in types)
    tokenizer = Tokenizer(models.Unigram(list(zip(tokens, map(float, scores), strict=True)), unknown, falls_back))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps: list[Any] = list(before)
    if trims:
        steps += [normalizers.Strip(True, True), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    after = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*after, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=types[i] in special)
            for i, token in enumerate(tokens)
            if token and types[i] in (*special, TokenType.USER_DEFINED)
        ]
    )
    return tokenizer


def charsmap(data: bytes, name: str = "nmt_nfkc") -> list[Any]:
    """SentencePiece's compiled normalization as normalizers; none where there is none.

    Args:
        name: of its rules. Those of machine translation ("nmt") make blanks of line ends; the library looks at whole
            grapheme clusters, of which "\\r\\n" is one that they do not have.
    Raises:
        ValueError: it cannot be read.
    """
    if not data:
        return []
    try:
        made = normalizers.Precompiled(data)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"its normalization cannot be read: {error}.") from None
    return [normalizers.Replace("\r\n", "\n\n"), made] if name.startswith("nmt") else [made]
