"""The host-made token mask of a step: grammars, allowed_token_ids and bad_words, one row a sampled request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serving.engine.request import Request


def is_constrained(request: Request) -> bool:
    """Whether the request's next token is limited by something that only the host knows."""
    spec = request.spec
    return spec.constraint is not None or spec.params.allowed_token_ids is not None or bool(spec.bad_words_token_ids)


def fill_row(request: Request, row_W: np.ndarray) -> None:
    """Writes the allowed set of the request's next token, from the tokens known now; see TokenConstraint.fill_mask.

    Raises:
        RuntimeError: the grammar cannot go on.
    """
    spec = request.spec
    if spec.constraint is not None:
        spec.constraint.fill_mask(row_W)
    else:
        row_W[:] = -1
    if spec.params.allowed_token_ids is not None:
        allowed = np.zeros_like(row_W)
        set_bits(allowed, list(spec.params.allowed_token_ids), True)
        row_W &= allowed
    for sequence in spec.bad_words_token_ids:
        *before, last = sequence
        if not before or request.tokens[request.prompt_len :][-len(before) :] == before:
            set_bits(row_W, [last], False)


def set_bits(row_W: np.ndarray, tokens: Sequence[int], value: bool) -> None:
    """Sets or clears the bits of some token ids."""
    bits = row_W.view(np.uint32)
    ids = np.asarray(tokens, np.int64)
    flags = np.left_shift(np.uint32(1), (ids % 32).astype(np.uint32))
    if value:
        np.bitwise_or.at(bits, ids // 32, flags)
    else:
        np.bitwise_and.at(bits, ids // 32, ~flags)
