"""Every error that the code can tell of, read out of the code: `docs/reference/errors.md` of the site.

What a client is told is a `RequestError`, or what `invalid` makes; what an operator is told at the start is a `ValueError` in a
sentence. Their texts are written so that they say what to do. Where a `code` tells clients more, docs/errors.md has its remedy.
"""

from __future__ import annotations

import ast
import dataclasses
import pathlib
from collections.abc import Iterator

REPO = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("serving", "models", "sharding")
AT_START = (
    "serving/boot",
    "serving/access",
    "serving/engine/api",
    "serving/server",
    "serving/plan",
    "serving/fleet",
    "models",
    "sharding",
)
"""Where a ValueError reaches the operator."""
KINDS = {
    "INVALID_ARGUMENT": "400: the request itself",
    "UNAUTHENTICATED": "401: the key",
    "PERMISSION_DENIED": "403: what the key may do",
    "NOT_FOUND": "404: names",
    "FAILED_PRECONDITION": "409: what does not fit the server's state",
    "RESOURCE_EXHAUSTED": "429: no room",
    "INTERNAL": "500: the server's fault",
    "UNIMPLEMENTED": "501: what this model or server does not do",
    "UNAVAILABLE": "503: not now",
    "DEADLINE_EXCEEDED": "504: too late",
}
START = "At the start"


@dataclasses.dataclass(frozen=True)
class Told:
    """One sentence that the code can tell.

    Attributes:
        kind: of KINDS, or START.
        text: with `…` where values stand.
        param: the field at fault, where that is always the same.
        code: for programs, where there is one.
    """

    kind: str
    text: str
    param: str | None = None
    code: str | None = None


def told() -> list[Told]:
    """All of them, each once, by kind and text."""
    found: set[Told] = set()
    for folder in FOLDERS:
        for path in sorted((REPO / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names, makers = _constants(tree), _makers(tree)
            starts = path.relative_to(REPO).as_posix().startswith(AT_START)
            calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
            found.update(one for call in calls for one in _told(call, names, makers, starts))
    return sorted(found, key=lambda one: ([*KINDS, START].index(one.kind), one.text, one.param or "", one.code or ""))


def codes() -> set[str]:
    """Every `code` that the code gives an error."""
    from serving.frontends.openai.errors import _TYPES  # what kinds without a code of their own have

    return {one.code for one in told() if one.code} | {code for _, code in _TYPES.values() if code}


def errors_page() -> str:
    """The page."""
    lines = [
        "# Every error", "",
        "Made from the code. `…` stands for a value. Remedies by `code` are in [errors](../errors.md); here each sentence has its",
        "own.", "",
    ]  # fmt: skip
    every = told()
    for kind, heading in {**KINDS, START: START}.items():
        rows = [one for one in every if one.kind == kind and one.text.strip("… .")]
        if not rows:
            continue
        lines += [f"## {heading}", ""]
        if kind != START:
            lines += [f"gRPC: `{kind}`.", "", "| sentence | field | code |", "|---|---|---|"]
            lines += [f"| {_cell(one.text)} | {_code(one.param)} | {_code(one.code)} |" for one in rows]
        else:
            lines += ["Printed to standard error; the exit status is 1, or 2 for flags.", ""]
            lines += [f"- {_cell(one.text)}" for one in rows]
        lines.append("")
    return "\n".join(lines)


def _told(
    call: ast.Call, names: dict[str, str], makers: dict[str, tuple[str, ast.expr | None]], starts: bool
) -> Iterator[Told]:
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    keywords = {word.arg: word.value for word in call.keywords if word.arg}
    arguments = list(call.args)
    if function in ("invalid", "_invalid") and arguments:
        kind, text, rest = "INVALID_ARGUMENT", arguments[0], arguments[1:]
        param = rest[0] if rest else keywords.get("param")
        code = rest[1] if len(rest) > 1 else keywords.get("code")
    elif function == "RequestError" and len(arguments) > 1 and isinstance(arguments[0], ast.Attribute):
        kind, text, param, code = arguments[0].attr, arguments[1], keywords.get("param"), keywords.get("code")
    elif function in makers and arguments:
        (kind, code), text, param = makers[function], arguments[0], None
    elif function == "ValueError" and starts and arguments:
        kind, text, param, code = START, arguments[0], None, None
    else:
        return
    if kind in {*KINDS, START}:
        yield Told(kind, _text(text, names), _plain(param, names), _plain(code, names))


def _text(node: ast.expr, names: dict[str, str]) -> str:
    """A string of the code, with … for what is only known when it runs."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, names) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, names) + _text(node.right, names)
    if isinstance(node, ast.IfExp):
        return _text(node.body, names)
    if isinstance(node, ast.BoolOp):
        return _text(node.values[-1], names)
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    return "…"


def _makers(tree: ast.Module) -> dict[str, tuple[str, ast.expr | None]]:
    """A file's functions that make an error of their first argument: name -> (kind, code)."""
    found: dict[str, tuple[str, ast.expr | None]] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not node.args.args:
            continue
        last = node.body[-1]
        call = last.value if isinstance(last, ast.Return) else None
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "RequestError" and len(call.args) > 1:
            kind, text = call.args[0], call.args[1]
            if isinstance(kind, ast.Attribute) and isinstance(text, ast.Name) and text.id == node.args.args[0].arg:
                found[node.name] = kind.attr, next((word.value for word in call.keywords if word.arg == "code"), None)
    return found


def _plain(node: ast.expr | None, names: dict[str, str]) -> str | None:
    text = None if node is None else _text(node, names)
    return None if text in (None, "None") or "…" in (text or "") else text


def _constants(tree: ast.Module) -> dict[str, str]:
    """Texts that a file gives names, at its top level."""
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    return found


def _code(text: str | None) -> str:
    return f"`{text}`" if text else "–"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_").split())
