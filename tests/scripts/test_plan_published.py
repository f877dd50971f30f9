"""The comparison with published numbers: what is kept belongs to what is listed, and the page shows it."""

import json
import pathlib

import plan_published
import pytest

from serving.plan import chips, facts

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def kept():
    rows = {plan_published.key(row): row for row in json.loads(plan_published.KEPT.read_text())}
    return [rows[plan_published.key(row)] | row for row in plan_published.PUBLISHED]


def test_every_row_can_be_planned_and_was(kept):
    for row in kept:
        facts.read_config(row["model"])
        assert chips.parse_target(row["topology"]).platform == "tpu"
        assert row["predicted"] > 0 and row["source"].startswith("https://")
        # Tokens a second are those of the step: reading (or products, whichever is longer), then sending.
        assert row["batch"] / row["predicted"] * 1e3 >= (row["read_ms"] + row["sent_ms"]) * 0.999
        assert plan_published.most(row) >= row["predicted"]


def test_the_page_has_the_table(kept):
    assert plan_published.table(kept) in (ROOT / "docs" / "plan.md").read_text()


def test_the_chart_is_drawn(kept, tmp_path):
    pytest.importorskip("matplotlib")
    plan_published.draw(kept, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
