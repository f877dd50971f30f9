"""Facts of this installation: its version, and where this user's files are kept."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib

DISTRIBUTION = "jaxserve-engine"
"""The name under which the packages are installed. Not the command's: `jaxserve` is another project's in the package index, and
nobody is to be told to install that."""


def extra(name: str) -> str:
    """How an optional dependency is installed, to end a sentence with: out of the checkout or a wheel, never by a name that an
    index may hold something else under."""
    return f"pip install -e '.[{name}]' in the checkout (of a wheel: pip install 'FILE.whl[{name}]')"


def version() -> str:
    """This package's version."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def cache_folder() -> pathlib.Path:
    """Where this user's compiled programs are kept; JAXSERVE_CACHE overrides the platform's choice."""
    import platformdirs

    return pathlib.Path(os.environ.get("JAXSERVE_CACHE") or platformdirs.user_cache_dir("jaxserve"))
