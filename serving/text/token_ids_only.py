"""What stands in for the tokenizer of a model that has none: requests bring token ids, and answers are token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tokenizers

from serving.errors import RequestError, invalid
from serving.text.tokenizer import Tokenizer


class TokenIdsOnly(Tokenizer):
    """A tokenizer without a vocabulary. It reads no text, and every token's text is empty.

    Args:
        eos_token_ids: what ends a completion, where the checkpoint says it.
    """

    def __init__(self, eos_token_ids: Iterable[int] = ()) -> None:
        super().__init__(tokenizers.Tokenizer(tokenizers.models.WordLevel({}, unk_token="")))
        self.eos_token_ids = tuple(eos_token_ids)

    @property
    def reads_text(self) -> bool:
        return False

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Refuses with INVALID_ARGUMENT."""
        raise _no_text()

    def encode_pair(
        self, first: str, second: str | None = None, max_tokens: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Refuses with INVALID_ARGUMENT."""
        raise _no_text()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Empty."""
        return ""


def _no_text() -> RequestError:
    return invalid(
        "This model was started without a tokenizer: send token ids as the prompt, and ask for the answer's ids "
        "(return_token_ids). Text needs a server with --tokenizer.",
        "prompt",
    )
