"""A file that says what the server was doing when it died: configuration, load, last steps, stacks, versions.

No prompt, completion, key or header is in it: stacks have no values of variables, and of exceptions only those of ours and
of XLA say their message.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

from serving.installation import DISTRIBUTION

log = logging.getLogger(__name__)

KEPT = 10
"""Reports in a folder; older ones are removed."""

MAX_MESSAGE_CHARS = 2000
PACKAGES = (DISTRIBUTION, "jax", "jaxlib", "flax", "numpy", "grpcio", "llguidance", "tokenizers", "uvicorn")


def folder() -> pathlib.Path:
    """Where reports go unless the operator says: the user's state folder."""
    import platformdirs

    return pathlib.Path(platformdirs.user_state_dir("jaxserve")) / "crashes"


def write(
    where: pathlib.Path,
    error: BaseException,
    *,
    flags: Mapping[str, Any],
    stats: Any = None,
    steps: Iterable[Any] = (),
) -> pathlib.Path | None:
    """Writes a report, readable by its owner alone. Never raises: a full disk must not hide the failure that it reports.

    Args:
        flags: what the server was started with; without secrets.
        stats, steps: dataclasses: the engine's counters and its last steps.
    Returns:
        the file, or None where none could be written.
    """
    report = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "error": {"type": type(error).__name__, "message": _message(error), "stack": _stack(error)},
        "flags": {name: str(value) for name, value in flags.items()},
        "stats": dataclasses.asdict(stats) if stats is not None else None,
        "steps": [dataclasses.asdict(step) for step in steps],
        "threads": _threads(),
        "versions": _versions(),
    }
    try:
        where.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = f"crash-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}.json"
        handle, draft = tempfile.mkstemp(dir=where, suffix=".tmp")  # of mode 0600
        with open(handle, "w", encoding="utf-8") as out:
            json.dump(report, out, indent=1, default=_plain)
        os.replace(draft, where / name)
        for old in sorted(where.glob("crash-*.json"))[:-KEPT]:
            old.unlink(missing_ok=True)
        return where / name
    except OSError as failure:
        log.error("the crash report could not be written: %s", failure.strerror)
        return None


def _message(error: BaseException) -> str:
    """An exception's words, where they are known to hold nobody's text."""
    module = type(error).__module__
    known = module.startswith(("serving.", "jax")) or type(error) in (RuntimeError, MemoryError)
    return str(error)[:MAX_MESSAGE_CHARS] if known else "(left out: it may quote a request)"


def _plain(value: object) -> list[Any]:
    """What JSON has no word for: sets of names, and arrays of counts."""
    return sorted(value) if isinstance(value, (set, frozenset)) else list(getattr(value, "tolist", list)())


def _stack(error: BaseException) -> list[str]:
    return [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]


def _threads() -> dict[str, list[str]]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        f"{names.get(ident, '?')} ({ident})": [
            f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_stack(frame)
        ]
        for ident, frame in sys._current_frames().items()
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
