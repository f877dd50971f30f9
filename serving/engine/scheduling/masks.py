"""The host-made token mask of a step: grammars, allowed_token_ids and bad_words, one row a sampled request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from serving.engine.requests.request import Request


def is_constrained(request: Request) -> bool:
    """Whether the request's next token is limited by something that only the host knows."""
    spec = request.spec
    return spec.constraint is not None or spec.params.allowed_token_ids is not None or bool(spec.bad_words_token_ids)


def needs_host(request: Request) -> bool:
    """Whether the host has a part in every one of the request's tokens: a mask before it, or logprobs to read after."""
    return is_constrained(request) or request.spec.params.logprobs is not None


def fill_rows(
    rows: Sequence[tuple[int, Request]], mask_RW: np.ndarray, drafts: Mapping[str, Sequence[int]] = MappingProxyType({})
) -> dict[int, Exception]:
    """Writes the allowed set of each request's next token, from the tokens known now; see TokenConstraint.fill_mask.

    Constraints of a class that fills many masks at once (a static `fill_masks`) are filled together, on several cores.

    Args:
        rows: (row of the mask, request).
        mask_RW: int32 [R, ceil(V / 32)], all ones where a row is not mentioned.
        drafts: request id -> drafts that are verified; the rows behind the request's own are theirs, one each. What follows a
            draft that is not allowed stays as it is: nothing comes of it.
    Returns:
        row -> what its grammar raised, for those that cannot go on; their rows are unusable.
    """
    failed: dict[int, Exception] = {}
    together: dict[Any, list[tuple[Any, int]]] = {}
    for row, request in rows:
        constraint = request.spec.constraint
        if constraint is None:
            continue
        ahead = drafts.get(request.request_id, ())
        many = getattr(type(constraint), "fill_masks", None)
        if many is not None and not ahead:
            together.setdefault(many, []).append((constraint, row))
            continue
        try:
            if ahead:
                constraint.fill_ahead(ahead, mask_RW[row : row + 1 + len(ahead)])
            else:
                constraint.fill_mask(mask_RW[row])
        except Exception as error:  # whatever it is, it is this request's
            failed[row] = error
    for many, items in together.items():
        failed.update(many(items, mask_RW))
    for row, request in rows:
        output = request.tokens[request.prompt_len :] if request.spec.bad_words_token_ids else []
        ahead = drafts.get(request.request_id, ())
        for place in range(1 + len(ahead)):
            _narrow(request, [*output, *ahead[:place]], mask_RW[row + place])
    return failed


def _narrow(request: Request, output: list[int], row_W: np.ndarray) -> None:
    """Takes away what allowed_token_ids and bad_words forbid behind a completion."""
    spec = request.spec
    if spec.params.allowed_token_ids is not None:
        allowed = np.zeros_like(row_W)
        set_bits(allowed, list(spec.params.allowed_token_ids), True)
        row_W &= allowed
    for sequence in spec.bad_words_token_ids:
        *before, last = sequence
        if not before or output[-len(before) :] == before:
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
