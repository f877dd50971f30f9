"""Facts of this installation: its version, and where this user's files are kept."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib

DISTRIBUTION = "jaxserve"
"""The name under which the packages are installed."""


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
