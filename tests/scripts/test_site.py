"""The documentation as a site: it builds without a warning, and its pages from the code hold what the code has."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from scripts.site_reference import flags_page, http_page

REPO = pathlib.Path(__file__).resolve().parents[2]


def test_pages_are_made_from_the_code():
    assert "`--max-num-seqs`" in flags_page() and "--inject-fault" not in flags_page()
    page = http_page()
    assert "## POST /v1/messages\n" in page and "| `max_tokens` (required) | integer" in page


def test_the_site_builds_strictly(tmp_path: pathlib.Path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/reference/flags.html").is_file() and (tmp_path / "site/migrate_vllm.html").is_file()
