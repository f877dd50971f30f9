"""How many pages sequences take where layers have windows."""

from __future__ import annotations

import pytest

from serving.engine.cache.kv_windows import first_page, longest, pages_of, window_pages


def test_first_page():
    assert [first_page(8, position, 4) for position in (0, 7, 10, 11, 12, 15)] == [0, 0, 0, 1, 1, 2]
    assert first_page(None, 1000, 4) == 0


@pytest.mark.parametrize("window", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_a_window_and_a_piece_fit_wherever_they_begin(window, chunk):
    size = 4
    most = max(
        -(-(start + chunk) // size) - first_page(window, start, size) for start in range(window, window + 4 * size)
    )
    assert most <= window_pages(window, chunk, size) - 1 <= most + 1  # one more that is not indexed yet


@pytest.mark.parametrize("windows", [(None,), (16,), (None, 16, 16), (16, 40)])
def test_the_longest_sequence_is_the_longest_that_fits(windows):
    for pages in range(4, 80):
        tokens = longest(pages, windows, 4)
        if tokens is None:
            assert None not in windows and pages_of(10**6, windows, 4) <= pages
        else:
            assert pages_of(tokens, windows, 4) <= pages < pages_of(tokens + 1, windows, 4)
