"""python -m serving.access FILE NAME [--role user|monitor|proxy|admin]: makes an API key, shown once, and adds its hash to FILE."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

from serving.access.keys import Role, file_line, new_secret, read_file


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 when the file or the name cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m serving.access", description=__doc__, allow_abbrev=False)
    parser.add_argument("file", type=pathlib.Path, help="key file; made, readable by its owner alone, when missing")
    parser.add_argument("name", help="whom the key is for: shown in logs, and the tenant of fair sharing")
    parser.add_argument("--role", choices=[role.value for role in Role], default=Role.USER.value)
    args = parser.parse_args(argv)
    secret = new_secret()
    try:
        line = file_line(args.name, Role(args.role), secret)
        if args.file.exists() and any(args.name == name for name, _, _ in read_file(args.file)):
            raise ValueError(f"{args.file} has a key called {args.name!r} already.")
        with open(os.open(args.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8") as out:
            out.write(line + "\n")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(secret)
    return 0


if __name__ == "__main__":
    sys.exit(main())
