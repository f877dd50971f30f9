"""Constraints and bans that leave a completion nothing to say: found before it is queued."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from serving.engine.api.constraint import TokenConstraint, TooComplexError
from serving.engine.api.sampling_params import SamplingParams
from serving.errors import RequestError, invalid

if TYPE_CHECKING:
    from serving.text.tokenizer import Tokenizer


def check_reach(
    constraint: Callable[[], TokenConstraint | None],
    params: SamplingParams,
    bad_words: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    vocab_size: int,
) -> None:
    """Refuses a structured output that `allowed_token_ids` and `bad_words` leave no token, or no choice, to begin with.

    Raises:
        RequestError: INVALID_ARGUMENT naming them.
    """
    allowed = params.allowed_token_ids
    if allowed is None and not bad_words:
        return
    wanted = params.structured_outputs
    choices = wanted.choice if wanted is not None else None
    if choices and not any(_can_say(choice, params, tokenizer) for choice in choices):
        raise _refused(params)
    fresh = constraint()
    if fresh is None:
        return
    mask_W = np.zeros((vocab_size + 31) // 32, np.int32)
    try:
        fresh.fill_mask(mask_W)
    except TooComplexError as error:
        raise invalid(str(error), "structured_outputs") from None
    left = set(np.unpackbits(mask_W.view(np.uint8), bitorder="little").nonzero()[0].tolist())
    left -= {sequence[0] for sequence in bad_words if len(sequence) == 1}
    if allowed is not None:
        left &= set(allowed)
    if not left:
        raise _refused(params)


def _refused(params: SamplingParams) -> RequestError:
    name = "allowed_token_ids" if params.allowed_token_ids is not None else "bad_words"
    return invalid(f"structured_outputs and {name} exclude each other: no completion satisfies both.", name)


def _can_say(choice: str, params: SamplingParams, tokenizer: Tokenizer) -> bool:
    """Whether a choice holds no banned text, and can be put together from the allowed tokens."""
    if any(word.strip() and word.strip() in choice for word in params.bad_words):
        return False
    if params.allowed_token_ids is None:
        return True
    return _spells(choice.encode(), {tokenizer.token_bytes(i) for i in params.allowed_token_ids} - {b""})


def _spells(text: bytes, pieces: Collection[bytes]) -> bool:
    """Whether `text` is a sequence of the pieces."""
    reached = {0}
    for at in range(len(text)):
        if at in reached:
            reached |= {at + len(piece) for piece in pieces if text.startswith(piece, at)}
    return len(text) in reached
