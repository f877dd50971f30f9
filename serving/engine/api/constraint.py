"""What the engine knows of a grammar: a mask before a token, an acceptance after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class TooComplexError(RuntimeError):
    """A grammar grew too complex to go on. Its message is for the request's author, whose grammar it is."""


class TokenConstraint(Protocol):
    """Limits which token may come next. One instance a running request, used by one thread at a time."""

    def fill_mask(self, mask_W: np.ndarray) -> None:
        """Writes the allowed set of the next token into `mask_W`.

        Args:
            mask_W: int32 [ceil(vocab / 32)], bit t % 32 of word t // 32 is 1 where token t may come next. Written
                whole. End-of-sequence is allowed exactly where the grammar may end.
        Raises:
            TooComplexError: the grammar grew too complex to go on; the request ends, its author's to mend. Whatever else is
                raised is our failure, and ends the request too.
        """
        ...

    def fill_ahead(self, drafts: Sequence[int], mask_QW: np.ndarray) -> None:
        """As `fill_mask`, also for the tokens behind drafts: row i is what may come behind the first i of them. Rows behind a
        draft that is not allowed are left alone, and so is the state.

        Requests whose constraint cannot do this are given no drafts.

        Args:
            drafts: up to Q - 1 tokens.
            mask_QW: int32 [Q, ceil(vocab / 32)].
        Raises:
            RuntimeError: as `fill_mask`.
        """
        ...

    def accept(self, token: int) -> bool:
        """Advances past `token`. False if the grammar does not allow it (the state is then unchanged).

        Raises:
            TooComplexError: as `fill_mask`.
        """
        ...

    @property
    def finished(self) -> bool:
        """Whether the grammar is complete and nothing but end-of-sequence can follow."""
        ...
