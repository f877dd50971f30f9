"""Pages of the site that are made from docstrings and protocol files: what Python imports from `serving`, and gRPC's services."""

from __future__ import annotations

import ast
import pathlib
import re

REPO = pathlib.Path(__file__).resolve().parents[1]


def python_page() -> str:
    """What `import serving` gives, with signatures and docstrings. Read from the sources: nothing is imported."""
    lines = ["# Python", "", "`from serving import ...`, in a notebook or a script; no server is needed.", ""]
    for module, name in _exports():
        node = _defined(module, name)
        if node is None:
            continue
        lines += [f"## {name}", "", _doc(node), ""]
        if isinstance(node, ast.ClassDef):
            lines += _attributes(node)
            for method in _public(node):
                lines += [
                    f"### {name}.{method.name}",
                    "",
                    f"```python\n{_signature(method)}\n```",
                    "",
                    _doc(method),
                    "",
                ]
        else:
            lines += [f"```python\n{_signature(node)}\n```", ""]
    return "\n".join(lines)


def grpc_page() -> str:
    """The services of the protocol files, call by call, and their messages."""
    lines = [
        "# gRPC",
        "",
        "Package `jaxserve.v1`; the files are in `proto/`, and a server tells them by reflection.",
        "",
    ]
    for name in ("inference", "control", "sampling"):
        text = (REPO / f"proto/jaxserve/v1/{name}.proto").read_text(encoding="utf-8")
        for service, body in re.findall(r"\nservice (\w+) \{\n(.*?)\n\}", text, re.S):
            lines += [f"## {service}", "", "| call | takes | gives | |", "|---|---|---|---|"]
            for comment, call, takes, gives in re.findall(
                r"((?:  //[^\n]*\n)*)  rpc (\w+)\(([^)]*)\) returns \(([^)]*)\)", body
            ):
                lines.append(f"| `{call}` | {takes} | {gives} | {_cell(_prose(comment))} |")
            lines.append("")
        for comment, message, body in re.findall(r"((?://[^\n]*\n)*)message (\w+) \{(?:\n(.*?)\n)?\}", text, re.S):
            rows = re.findall(r"((?:  //[^\n]*\n)*)  ((?:optional |repeated )?[\w.]+(?:<[^>]*>)?) (\w+) = \d+;", body)
            lines += [f"### {message}", "", _prose(comment), ""]
            if rows:
                lines += ["| field | type | |", "|---|---|---|"]
                lines += [f"| `{field}` | {_cell(kind)} | {_cell(_prose(about))} |" for about, kind, field in rows]
                lines.append("")
    return "\n".join(lines)


def _exports() -> list[tuple[str, str]]:
    """(module, name) of what `serving` offers, in its order."""
    tree = ast.parse((REPO / "serving/__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        value = getattr(node, "value", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(value, ast.Dict):
            return [(module, name) for name, module in ast.literal_eval(value).items()]
    raise ValueError("serving/__init__.py has no table of what it offers.")


def _defined(module: str, name: str) -> ast.ClassDef | ast.FunctionDef | None:
    path = REPO / (module.replace(".", "/") + ".py")
    if not path.exists():
        path = REPO / module.replace(".", "/") / "__init__.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and any((one.asname or one.name) == name for one in node.names)
        ):
            return _defined(node.module, name)
    return None


def _public(node: ast.ClassDef) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    functions = (one for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef))
    return [one for one in functions if not one.name.startswith("_") or one.name == "__init__"]


def _attributes(node: ast.ClassDef) -> list[str]:
    """The fields of a dataclass, with their defaults."""
    fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]
    if not fields:
        return []
    rows = [
        f"| `{one.target.id}` | {_cell(ast.unparse(one.annotation))} | {_cell(ast.unparse(one.value)) if one.value else ''} |"  # type: ignore[union-attr]
        for one in fields
    ]
    return ["| field | type | default |", "|---|---|---|", *rows, ""]


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    head = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    gives = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{head} {node.name}({ast.unparse(node.args)}){gives}"


def _doc(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """A docstring as Markdown: its sections keep their lines."""
    text = ast.get_docstring(node) or ""
    return re.sub(r"^(Args|Raises|Returns|Yields|Attributes):$", r"**\1**\n", text, flags=re.M).replace("<", "&lt;")


def _prose(comment: str) -> str:
    return " ".join(line.strip().removeprefix("//").strip() for line in comment.splitlines())


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
