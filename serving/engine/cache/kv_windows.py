"""How many pages sequences take where layers have windows. Plain arithmetic, the same for scheduler, sizing and plans.

Layers that attend alike share page tables: an *attention group* (`ops.paged_attention.groups`) has one table a request, and
either a window or none.
"""

from __future__ import annotations

from collections.abc import Sequence


def first_page(window: int | None, position: int, page_size: int) -> int:
    """The first page that a position attends to."""
    return 0 if window is None else max(0, position - window + 1) // page_size


def window_pages(window: int, chunk: int, page_size: int) -> int:
    """Pages that a sequence holds at most in a group with a window, while pieces of `chunk` tokens are computed: those of the
    window and the piece, wherever in a page they begin, and one that is not in the prefix index yet."""
    return (window + chunk - 3) // page_size + 3


def pages_of(tokens: int, windows: Sequence[int | None], page_size: int, chunk: int = 1) -> int:
    """Pages that a sequence of so many tokens holds at most, in groups with these windows together."""
    whole = -(-tokens // page_size)
    return sum(whole if w is None else min(whole, window_pages(w, chunk, page_size)) for w in windows)


def longest(num_pages: int, windows: Sequence[int | None], page_size: int, chunk: int = 1) -> int | None:
    """Tokens of the longest sequence that so many pages hold, a multiple of the page size; None where none is too long.

    Args:
        num_pages: without the null page.
    """
    short, long = 0, num_pages + 1  # pages of the sequence
    if pages_of(1 << 60, windows, page_size, chunk) <= num_pages:
        return None
    while long - short > 1:
        middle = (short + long) // 2
        if pages_of(middle * page_size, windows, page_size, chunk) <= num_pages:
            short = middle
        else:
            long = middle
    return short * page_size
