"""The example plug-in, found as an installed package is: by its metadata."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from models import registry
from models.bridge import family as bridge
from tests.models.tiny import TINY
from tests.models.tiny_base import Tiny
from tests.models.tiny_reference import compare, make_reference

PLUGIN = Path(__file__).parents[2] / "examples" / "model_plugin"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Its dist-info as an installer would write it, on sys.path with the package."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    info = tmp_path / f"jaxserve_neox-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(PLUGIN))
    registry.families.cache_clear()
    yield
    registry.families.cache_clear()
    sys.modules.pop("jaxserve_neox", None)


def test_without_it_the_error_says_how_to_add_it(monkeypatch):
    monkeypatch.setattr(bridge, "installed", lambda: False)
    with pytest.raises(ValueError, match=r"'GPTNeoXForCausalLM' is not supported.*jaxserve\.models"):
        registry.find("GPTNeoXForCausalLM")


def test_it_wins_over_transformers_own_code(installed):
    assert not registry.find("GPTNeoXForCausalLM").traced


@pytest.mark.parametrize("parallel", [True, False])
def test_computes_what_transformers_does(installed, tmp_path, monkeypatch, parallel):
    assert registry.find("GPTNeoXForCausalLM").name == "GPT-NeoX, Pythia"
    fields = {"use_parallel_residual": parallel, "num_key_value_heads": None}
    tiny = Tiny("GPTNeoXConfig", "GPTNeoXForCausalLM", fields)
    monkeypatch.setitem(TINY, "neox", tiny)
    make_reference("neox", tmp_path / "neox")
    result = compare(tmp_path / "neox", steps=8)
    assert result["error"] < 1e-4
    assert result["tokens"] == 1.0
