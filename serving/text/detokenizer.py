"""Token ids to text while they arrive."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Turns a growing sequence of tokens into text, a piece at a time. One a completion.

    Every token stands for bytes (`Tokenizer.token_bytes`), so this is an incremental UTF-8 decoder: the cost is linear
    in the bytes, half a character is held back until its rest comes, and whatever the split, the pieces joined are
    `tokenizer.decode` of the whole.

    Args:
        tokenizer: the model's.
        skip_special_tokens: leave control tokens out.
        keep: control tokens that stay nevertheless: markers that the text is parsed by (`tools.kept_token_ids`).
        continues: the text goes on with another (a prompt): a leading blank belongs to it and stays, even if the
            tokenizer takes it off the start of a text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        keep: Collection[int] = (),
        continues: bool = False,
    ) -> None:
        self._bytes_of = tokenizer.token_bytes
        skip = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._skip = skip.difference(keep) if keep else skip
        self._strip = getattr(tokenizer, "strips_leading_space", False) and not continues
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain with these tokens; may be empty."""
        skip = self._skip
        raw = b"".join([self._bytes_of(i) for i in ids if i not in skip])
        if self._strip and raw:
            self._strip = False
            if raw[:1] == b" ":
                raw = raw[1:]
        return self._decoder.decode(raw)

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)
