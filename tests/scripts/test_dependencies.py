"""docs/dependencies.md tells the truth about pyproject.toml."""

from __future__ import annotations

import pathlib
import re
import tomllib

import pytest

REPO = pathlib.Path(__file__).resolve().parents[2]


def split(requirement: str) -> tuple[str, str]:
    """'name[extra]>=1,<2; marker' -> ('name[extra]', '>=1,<2; marker')."""
    match = re.match(r"([\w.-]+(?:\[[\w,-]+\])?)\s*(.*)$", requirement)
    assert match, f"cannot read the requirement {requirement!r}"
    return match[1], match[2]


def declared() -> dict[str, dict[str, str]]:
    """Section of the document -> package -> range, from pyproject.toml."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    groups = {
        name: [item for item in items if isinstance(item, str)] for name, items in project["dependency-groups"].items()
    }
    extras = [item for items in project["project"]["optional-dependencies"].values() for item in items]
    sections = {"To serve": project["project"]["dependencies"], "Extras": extras}
    titles = {"test": "To test", "fuzz": "To fuzz", "dev": "To develop"}
    sections |= {titles[name]: items for name, items in groups.items()}
    return {section: dict(map(split, items)) for section, items in sections.items()}


def documented() -> dict[str, dict[str, str]]:
    """The same, from the document's tables."""
    sections: dict[str, dict[str, str]] = {}
    for part in re.split(r"^## ", (REPO / "docs/dependencies.md").read_text(), flags=re.M)[1:]:
        title = part.splitlines()[0].split(" (")[0]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if "| `" in line]
        cells = [row[1:] if title == "Extras" else row for row in rows]
        for row in cells:
            assert row[2], f"{row[0]} has no reason"
        sections[title] = {row[0].strip("`"): row[1].strip("`") for row in cells}
    return sections


@pytest.mark.parametrize("section", ["To serve", "Extras", "To test", "To develop", "To fuzz"])
def test_document_lists_what_is_declared(section: str) -> None:
    assert documented()[section] == declared()[section]


def test_every_section_is_compared() -> None:
    assert documented().keys() == declared().keys()


def test_torch_is_for_tests_and_one_extra_and_pinned() -> None:
    parts = declared()
    assert parts["To test"]["torch"] == "==2.13.0"
    assert not {"torch", "transformers"} & parts["To serve"].keys()
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [name for name, items in extras.items() if any("torch" in item for item in items)] == ["transformers"]


INSTALLS = re.compile(r"pip install [^\n]*jaxserve(?:-engine)?(?=[\['\"\s.,;)]|$)")


def test_nobody_is_told_to_install_what_an_index_may_hold_for_somebody_else() -> None:
    """`jaxserve` is another project there, and our own name is not reserved: extras come from a checkout or a wheel."""
    found = []
    for folder in ("docs", "examples", "models", "ops", "scripts", "serving", "sharding", "."):
        for path in (REPO / folder).glob("*" if folder == "." else "**/*"):
            if path.suffix in {".md", ".py", ".toml", ".sh", ".yaml", ".ipynb"} or path.name == "Dockerfile":
                told = INSTALLS.findall(path.read_text(encoding="utf-8"))
                found += [f"{path.name}: {words}" for words in told if "beside jaxserve" not in words]
    assert not found
