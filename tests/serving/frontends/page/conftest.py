"""A browser for the tests of the page."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.serving.frontends.page import browser


@pytest.fixture
async def page(tmp_path) -> AsyncIterator[browser.Browser]:
    """A window of Chromium with a profile of its own."""
    async with browser.Browser(str(tmp_path)) as one:
        yield one
