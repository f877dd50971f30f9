"""The code of these packages as a number: what is kept between starts is only good for the code that made it."""

from __future__ import annotations

import functools
import hashlib
import pathlib

_KINDS = {".py", ".cc", ".h"}


@functools.cache
def digest(*folders: str) -> str:
    """A digest of all code in some folders, each given from where `ops` lies: `digest("models", "serving/engine")`."""
    root = pathlib.Path(__file__).resolve().parents[1]
    found = hashlib.sha256()
    for folder in folders:
        assert (root / folder).is_dir(), f"{root} is not where the code lies"
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in _KINDS:
                found.update(path.relative_to(root).as_posix().encode())
                found.update(path.read_bytes())
    return found.hexdigest()
