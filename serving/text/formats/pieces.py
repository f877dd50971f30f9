"""What all formats with SentencePiece's or GGUF's vocabularies share: the visible blank, kinds of tokens, ids around a text."""

from __future__ import annotations

import enum

from tokenizers import Tokenizer, processors

SPACE = "\u2581"  # SentencePiece's visible blank


class TokenType(enum.IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def set_template(tokenizer: Tokenizer, bos: int | None, eos: int | None) -> None:
    """Makes `tokenizer` put these ids around each text where special tokens are asked for."""
    if bos is None and eos is None:
        return
    specials = [(str(tokenizer.id_to_token(i)), i) for i in (bos, eos) if i is not None]
    single = ([specials[0][0]] if bos is not None else []) + ["$A"] + ([specials[-1][0]] if eos is not None else [])
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=None, special_tokens=specials)
