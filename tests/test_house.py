"""The house stands on floors: no circle of files, none of folders; and no room, file or function is too large to be held in mind.
What import-linter's contracts in pyproject.toml cannot say.

Every import counts: at the top of a file, inside a function, for the type checker alone.
"""

from __future__ import annotations

import ast
import functools
import pathlib
from collections.abc import Iterator, Mapping

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOP = ("proto", "ops", "sharding", "models", "serving")
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_FILES = 500, 80, 15
REASON = f"# Over {MOST_LINES_OF_A_FUNCTION} lines: "
"""Begins the comment right above a longer function that says why it is one."""


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


@functools.cache
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


def too_large(root: pathlib.Path, folder: str) -> list[str]:
    """What of a folder's Python outgrows its bounds, in words. Generated code does not count."""
    found = []
    for path in sorted((root / folder).rglob("*.py")):
        if "_pb2" in path.name:
            continue
        text, name = path.read_text(), path.relative_to(root).as_posix()
        lines = text.splitlines()
        if len(lines) > MOST_LINES:
            found.append(f"{name} has {len(lines)} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
                length = node.end_lineno - node.lineno + 1
                if length > MOST_LINES_OF_A_FUNCTION and not _comment_above(lines, first - 1).startswith(REASON):
                    found.append(f"{name}: {node.name} has {length} lines")
    return found


def _comment_above(lines: list[str], index: int) -> str:
    """The block of comment lines that ends above a line, one text."""
    first = index
    while first and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return " ".join(line.strip() for line in lines[first:index])


def too_full(root: pathlib.Path, folder: str) -> list[str]:
    """Folders with too many files, in words."""
    found = []
    for path in (root / folder, *sorted((root / folder).rglob("*/"))):
        if path.name != "__pycache__":
            number = sum(1 for one in path.iterdir() if one.is_file() and not one.name.startswith("."))
            if number > MOST_FILES:
                found.append(f"{path.relative_to(root).as_posix()} has {number} files")
    return found


def by_locale(root: pathlib.Path, folder: str) -> list[str]:
    """Where a file's text is read or written in whatever encoding the user's locale has."""
    found = []
    for path in sorted((root / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "_text(" in text else ():
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in ("read_text", "write_text") and "encoding" not in [one.arg for one in node.keywords]:
                found.append(f"{path.relative_to(root).as_posix()}:{node.lineno}")
    return found


@pytest.mark.parametrize("folder", ["serving", "models", "sharding"])
def test_text_is_utf_8_in_every_locale(folder):
    assert by_locale(ROOT, folder) == []


def test_text_in_the_locales_encoding_is_found(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.py").write_text('p.read_text(encoding="utf-8")\np.write_text("x")\nq(p.read_text())\n')
    assert by_locale(tmp_path, "a") == ["a/x.py:2", "a/x.py:3"]


@pytest.mark.parametrize("folder", [*TOP, "scripts"])
def test_no_file_and_no_function_is_too_large(folder):
    assert too_large(ROOT, folder) == []


@pytest.mark.parametrize("folder", ["serving", "models/families"])
def test_no_folder_is_too_full(folder):
    assert too_full(ROOT, folder) == []


def test_what_is_too_large_is_found(tmp_path):
    long = "".join(f"    x{i} = 0\n" for i in range(MOST_LINES_OF_A_FUNCTION))
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/x.py").write_text(
        f"# Why.\ndef f():\n{long}\n\n{REASON}it is\n# one thing.\n@cache\ndef g():\n{long}"
    )
    (tmp_path / "a/y.py").write_text("# a line\n" * (MOST_LINES + 1))
    (tmp_path / "a/z_pb2.py").write_text("# a line\n" * (MOST_LINES + 1))
    for i in range(MOST_FILES + 1):
        (tmp_path / f"a/b/{i}.js").write_text("")
    assert too_large(tmp_path, "a") == ["a/x.py: f has 81 lines", "a/y.py has 501 lines"]
    assert too_full(tmp_path, "a") == ["a/b has 16 files"]
