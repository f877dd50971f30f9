"""The process with torch: `python -m models.bridge trace DTYPE OUT` with a config.json on its standard input, or `reference FOLDER
TOKENS OUT`. It ends with 3 where it refuses, the reason on its standard output."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from models.bridge.graph import Refused


def main(arguments: list[str]) -> int:
    """Does one of the two."""
    command, first, *rest = arguments
    try:
        if command == "trace":
            from models.bridge.tracing import trace

            Path(rest[0]).write_bytes(trace(json.load(sys.stdin), first).to_bytes())
        else:
            from models.bridge.eager import reference

            Path(rest[1]).write_bytes(reference(first, json.loads(rest[0])))
    except Refused as e:
        print(e)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
