"""docs/platforms.md is what the ops' own lists say."""

import pytest

from scripts import platforms


def test_the_page_is_current():
    assert platforms.PAGE.read_text(encoding="utf-8") == platforms.page(), "run `python scripts/platforms.py`"


def test_bodies_and_what_is_known_of_them_agree(monkeypatch):
    known = dict(platforms.SEEN["sampling"])
    monkeypatch.setitem(platforms.SEEN, "sampling", {**known, "pallas_gpu": {}})
    with pytest.raises(ValueError, match="pallas_gpu"):
        platforms.rows()
    monkeypatch.setitem(platforms.SEEN, "sampling", {"xla": known["xla"]})
    with pytest.raises(ValueError, match="native"):
        platforms.rows()
