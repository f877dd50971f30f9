"""/docs: the API document as one page of plain HTML, for people; it loads nothing and runs nothing."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

DOCS_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "code{font-family:ui-monospace,monospace}table{border-collapse:collapse;width:100%}td{padding:.15rem .8rem .15rem 0;"
    "vertical-align:top;border-top:1px solid #8884}summary{cursor:pointer}"
)


def documentation(document: Mapping[str, Any]) -> str:
    """A page with every route and the fields of its body.

    Args:
        document: the API document (OpenAPI 3.1).
    """
    schemas = document.get("components", {}).get("schemas", {})
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{_safe(document['info']['title'])} API</title>",
        f"<style>{STYLE}</style><h1>{_safe(document['info']['title'])} {_safe(document['info']['version'])}</h1>",
        "<p>Machines read <a href=openapi.json>openapi.json</a>.</p>",
    ]
    for path, operations in sorted(document["paths"].items()):
        for method, operation in operations.items():
            parts.append(_operation(method, path, operation, schemas))
    return "".join(parts)


def _operation(method: str, path: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    schema = _resolved(body, schemas)
    rows = "".join(_row(name, field, schema, schemas) for name, field in schema.get("properties", {}).items())
    table = f"<table>{rows}</table>" if rows else ""
    text = _safe(operation.get("description", ""))
    return f"<details><summary><code>{method.upper()} {_safe(path)}</code> {text}</summary>{table}</details>"


def _row(name: str, field: Mapping[str, Any], schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    needed = " (required)" if name in schema.get("required", ()) else ""
    kind, text = _safe(_kind(field, schemas)), _safe(field.get("description", ""))
    return f"<tr><td><code>{_safe(name)}</code>{needed}<td>{kind}<td>{text}"


def _kind(field: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(kind for one in field["anyOf"] if (kind := _kind(one, schemas)) != "null")
    if "enum" in field or "const" in field:
        return ", ".join(map(str, field.get("enum", [field.get("const")])))
    if "$ref" in field:
        return field["$ref"].rsplit("/", 1)[-1]
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}), schemas)}"
    return str(field.get("type", "anything"))


def _resolved(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    return schemas.get(schema["$ref"].rsplit("/", 1)[-1], {}) if "$ref" in schema else schema


def _safe(text: Any) -> str:
    return html.escape(str(text))
