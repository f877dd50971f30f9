"""The documentation as a site: it builds without a warning, and its pages from the code hold what the code has."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

import serving
from proto.jaxserve.v1 import control_pb2, inference_pb2
from scripts.site_errors import codes, errors_page
from scripts.site_python import grpc_page, python_page
from scripts.site_reference import flags_page, http_page
from serving.boot.flags.launch import build_parser
from serving.frontends.app import create_app
from tests.mock_engine import mock_service

REPO = pathlib.Path(__file__).resolve().parents[2]


def test_pages_are_made_from_the_code():
    assert "`--max-num-seqs`" in flags_page() and "--inject-fault" not in flags_page()
    page = http_page()
    assert "## POST /v1/messages\n" in page and "| `max_tokens` (required) | integer" in page


def test_every_error_is_listed_and_every_code_has_its_remedy():
    page = errors_page()
    assert "The request's deadline passed" in page and "An engine of several processes can neither sleep" in page
    assert "| `model` | `model_not_found` |" in page and "## At the start" in page
    documented = re.findall(r"^\| `(\w+)` \| \d{3} \|", (REPO / "docs/errors.md").read_text(encoding="utf-8"), re.M)
    assert documented == sorted(documented) and set(documented) == codes()


def test_the_apis_of_python_and_grpc_are_made_from_the_code():
    python, grpc = python_page(), grpc_page()
    for name in serving.__all__:
        assert f"## {name}\n" in python, name
    assert "### LLM.generate" in python and "**Raises**" in python and "| `max_tokens` |" in python
    for service in (control_pb2.DESCRIPTOR, inference_pb2.DESCRIPTOR):
        for name, found in service.services_by_name.items():
            assert f"## {name}\n" in grpc and all(f"| `{call.name}` |" in grpc for call in found.methods)
        assert all(f"### {name}\n" in grpc for name in service.message_types_by_name)


@pytest.mark.parametrize("name", ["vllm", "llama_cpp", "ollama"])
def test_what_migration_pages_say_is_here_is_here(name: str):
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    flags |= {"--target", "--help"}  # the gateway's, and every command's
    paths = set(create_app(mock_service()).openapi()["paths"]) | {"/metrics", "/ping", "/"}
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", (REPO / f"docs/migrate_{name}.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 10
    for theirs, ours in rows:
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours):
            assert flag in flags, (theirs, flag)
        for route in re.findall(r"`(?:GET |POST )?(/[\w/]+)`", ours):
            assert route in paths, (theirs, route)


def test_the_site_builds_strictly(tmp_path: pathlib.Path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/reference/flags.html").is_file() and (tmp_path / "site/migrate_vllm.html").is_file()
