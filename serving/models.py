"""`python -m serving.models`: which architectures can be served, and why others cannot."""

from __future__ import annotations

import argparse
import json

from models.bridge.known import EQUAL
from models.refused import REFUSED
from models.registry import families, status


def rows() -> list[dict[str, object]]:
    """One entry a family: its name, `architectures` of config.json, `general.architecture` of GGUF files, and what it does."""
    return [
        {
            "name": f.name,
            "status": "native",
            "architectures": list(f.architectures),
            "gguf": list(f.gguf),
            "tasks": list(f.tasks),
        }
        for f in families()
    ]


def bridged() -> list[dict[str, object]]:
    """One entry an architecture that is known to be served by transformers' own code."""
    return [{"architecture": name, "status": status(name)} for name in sorted(EQUAL)]


def refused() -> list[dict[str, object]]:
    """One entry an architecture that transformers has and that is not served: its name, and the reason."""
    return [{"architecture": name, "status": status(name)} for name in sorted(REFUSED) if status(name) != "native"]


def main() -> None:
    """Prints the table and what is refused, or with --json one JSON object a line; of named architectures what they are."""
    parser = argparse.ArgumentParser(prog="python -m serving.models", description="Lists the supported architectures.")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument(
        "architecture", nargs="*", help="say of these alone whether they are native or why they are refused"
    )
    args = parser.parse_args()
    if args.architecture:
        for name in args.architecture:
            print(
                json.dumps({"architecture": name, "status": status(name)}) if args.json else f"{name}: {status(name)}"
            )
        return
    if args.json:
        for row in [*rows(), *bridged(), *refused()]:
            print(json.dumps(row))
        return
    table = [("family", "architectures (config.json)", "GGUF", "does")]
    table += [(f.name, ", ".join(f.architectures), ", ".join(f.gguf) or "-", ", ".join(f.tasks)) for f in families()]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\nBy transformers' own code (the extra `transformers`):")
    for entry in bridged():
        print(f"{entry['architecture']}: {entry['status']}")
    print("\nNot served:")
    for entry in refused():
        print(f"{entry['architecture']}: {entry['status']}")


if __name__ == "__main__":
    main()
