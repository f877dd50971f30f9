"""`python -m serving.models`: which architectures can be served."""

from __future__ import annotations

import argparse
import json

from models.registry import families


def rows() -> list[dict[str, object]]:
    """One entry a family: its name, `architectures` of config.json, `general.architecture` of GGUF files, and what it does."""
    return [
        {"name": f.name, "architectures": list(f.architectures), "gguf": list(f.gguf), "tasks": list(f.tasks)}
        for f in families()
    ]


def main() -> None:
    """Prints the table, or with --json one JSON object a line."""
    parser = argparse.ArgumentParser(prog="python -m serving.models", description="Lists the supported architectures.")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    if parser.parse_args().json:
        for row in rows():
            print(json.dumps(row))
        return
    table = [("family", "architectures (config.json)", "GGUF", "does")]
    table += [(f.name, ", ".join(f.architectures), ", ".join(f.gguf) or "-", ", ".join(f.tasks)) for f in families()]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
