"""A hook of mkdocs: the pages that are made from the code itself, so that none of them can be out of date.

`reference/flags.md` comes from the server's parser, `reference/http.md` from the application's own API document,
`reference/errors.md` from the sentences in the code, `reference/grpc.md` from the protocol files, `reference/python.md` from
docstrings.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

REPO = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "scripts")]

from site_errors import errors_page  # noqa: E402
from site_python import grpc_page, python_page  # noqa: E402


def flags_page() -> str:
    """Every flag of `jaxserve serve`, by group."""
    from serving.boot.flags.launch import _plain, build_parser

    lines = ["# Every flag", "", "Of `jaxserve serve`, which is `python -m serving.launch`.", ""]
    for group in build_parser()._action_groups:
        shown = [a for a in group._group_actions if a.option_strings and a.help is not argparse.SUPPRESS]
        if not shown:
            continue
        lines += [f"## {(group.title or 'Others').capitalize()}", "", "| flag | default | what |", "|---|---|---|"]
        for action in shown:
            names = ", ".join(f"`{name}`" for name in action.option_strings)
            lines.append(f"| {names} | {_cell(_plain(action.default))} | {_cell(action.help or '')} |")
        lines.append("")
    return "\n".join(lines)


def http_page() -> str:
    """Every route with the fields of its body."""
    from serving.frontends.app import create_app
    from tests.mock_engine import mock_service  # the document is the same for any engine

    document = create_app(mock_service()).openapi()
    schemas = document["components"]["schemas"]
    lines = ["# Every route", "", "From the application's own document, which a server gives at `/openapi.json`.", ""]
    for path, operations in sorted(document["paths"].items()):
        for method, operation in operations.items():
            lines += [f"## {method.upper()} {path}", "", operation.get("description", ""), ""]
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            fields = schemas.get(body.get("$ref", "").rsplit("/", 1)[-1], {})
            rows = [_field(name, field, fields) for name, field in fields.get("properties", {}).items()]
            if rows:
                lines += ["| field | takes | |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _field(name: str, field: dict[str, Any], of: dict[str, Any]) -> str:
    needed = " (required)" if name in of.get("required", ()) else ""
    return f"| `{name}`{needed} | {_cell(_kind(field))} | {_cell(field.get('description', ''))} |"


def _kind(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(kind for one in field["anyOf"] if (kind := _kind(one)) != "null")
    if "enum" in field or "const" in field:
        return ", ".join(map(str, field.get("enum", [field.get("const")])))
    if "$ref" in field:
        return field["$ref"].rsplit("/", 1)[-1]
    return f"list of {_kind(field['items'])}" if field.get("items") else str(field.get("type", "anything"))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


PAGES = {
    "reference/flags.md": flags_page,
    "reference/http.md": http_page,
    "reference/errors.md": errors_page,
    "reference/grpc.md": grpc_page,
    "reference/python.md": python_page,
}


def on_files(files: Any, config: Any) -> Any:
    """mkdocs asks which files there are."""
    from mkdocs.structure.files import File

    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))
    return files
