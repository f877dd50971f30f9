"""The house stands on floors: no circle of files, none of folders. What import-linter's contracts in pyproject.toml cannot say.

Every import counts: at the top of a file, inside a function, for the type checker alone.
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator, Mapping

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOP = ("proto", "ops", "sharding", "models", "serving")


def modules(root: pathlib.Path, top: tuple[str, ...]) -> dict[str, pathlib.Path]:
    """Dotted name -> file."""
    found = {}
    for folder in top:
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: pathlib.Path, names: Mapping[str, pathlib.Path]) -> Iterator[str]:
    """Which of the modules a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports are not used here"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in names:
                    yield whole
                elif node.module in names:
                    yield node.module


def graph(root: pathlib.Path, top: tuple[str, ...] = TOP) -> dict[str, set[str]]:
    """Module -> what it imports."""
    names = modules(root, top)
    return {name: set(imported(path, names)) - {name} for name, path in names.items()}


def folder_graph(root: pathlib.Path, top: tuple[str, ...] = TOP) -> dict[str, set[str]]:
    """Folder -> what its files import. Files that lie in a top folder itself stand each for themselves: errors at the bottom,
    entries at the top."""
    names = modules(root, top)

    def home(name: str) -> str:
        if names[name].name == "__init__.py":
            return name
        parent = name.rpartition(".")[0]
        return name if parent in top else parent

    folders: dict[str, set[str]] = {}
    for name, others in graph(root, top).items():
        folders.setdefault(home(name), set()).update(home(other) for other in others)
    return {folder: others - {folder} for folder, others in folders.items()}


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of nodes that reach each other, each sorted (Tarjan's strongly connected components of more than one)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in edges[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1:
                found.append(sorted(part))

    for node in edges:
        if node not in index:
            visit(node)
    return found


def test_no_circle_of_files():
    assert circles(graph(ROOT)) == []


def test_no_two_folders_import_each_other():
    edges = folder_graph(ROOT)
    for circle in circles(edges):
        ways = [f"{a} -> {b}" for a in circle for b in sorted(edges[a] & set(circle))]
        raise AssertionError("folders import each other:\n" + "\n".join(ways))


@pytest.mark.parametrize(
    "files,of_files,of_folders",
    [
        ({"a/x.py": "import a.y", "a/y.py": ""}, [], []),
        ({"a/x.py": "import a.y", "a/y.py": "def f():\n    from a import x"}, [["a.x", "a.y"]], [["a.x", "a.y"]]),
        (
            {"a/p/x.py": "from a.q.y import z", "a/q/y.py": "", "a/q/w.py": "from a.p import x"},
            [],
            [["a.p", "a.q"]],
        ),
        ({"a/p/x.py": "from a import errors", "a/errors.py": "", "a/run.py": "from a.p.x import f"}, [], []),
    ],
)
def test_circles_are_found(tmp_path, files, of_files, of_folders):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert circles(graph(tmp_path, ("a",))) == of_files
    assert circles(folder_graph(tmp_path, ("a",))) == of_folders
