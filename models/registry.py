"""Architectures by name: ours, and those that installed packages add.

A package adds families through the entry-point group `jaxserve.models`; each entry point is a `Family` or an iterable
of them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Mapping
from typing import Any

from models import families as ours
from models.bridge import family as bridge
from models.bridge.known import EQUAL
from models.family import Family
from models.refused import REFUSED, UNWRITTEN

ENTRY_POINTS = "jaxserve.models"
_NEEDS_EXTRA = f"transformers' own code of it may do, which needs torch and transformers: the extra {bridge.EXTRA!r}"
_NOT_TRIED = (
    "no family has been written for it; whether transformers' own code of it will do is found out when it is loaded"
)


@functools.cache
def families() -> tuple[Family, ...]:
    """Every family that can be loaded: ours by their files' names, then installed ones. An installed one wins over ours."""
    found: list[Family] = []
    files = pkgutil.walk_packages(ours.__path__, f"{ours.__name__}.")
    for module in sorted(info.name for info in files if not info.ispkg):
        found.extend(importlib.import_module(module).FAMILIES)
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        loaded = entry.load()
        found.extend([loaded] if isinstance(loaded, Family) else loaded)
    return tuple(found)


def find(architecture: str) -> Family:
    """The family of an `architectures` entry of config.json. For one that has none and for which no reason is known the bridge
    is asked, once there is a configuration.

    Raises:
        ValueError: it is not supported; the message lists what is.
    """
    table = {name: family for family in families() for name in family.architectures}
    if architecture in table:
        return table[architecture]
    if bridge.has(architecture) and (architecture not in REFUSED or architecture in UNWRITTEN):
        return bridge.bridged(architecture)
    raise ValueError(_unsupported(architecture, table))


def find_gguf(architecture: str) -> Family:
    """The family of a GGUF file's `general.architecture`.

    Raises:
        ValueError: it is not supported; the message lists what is.
    """
    table = {name: family for family in families() for name in family.gguf}
    if architecture not in table:
        raise ValueError(_unsupported(architecture, table))
    return table[architecture]


def status(architecture: str) -> str:
    """ "native", "bridged", or why the architecture is refused, in a sentence."""
    if any(architecture in family.architectures for family in families()):
        return "native"
    if architecture in REFUSED:
        return f"refused: {REFUSED[architecture]}"
    if not bridge.installed():
        return f"refused: {_NEEDS_EXTRA}"
    if architecture in EQUAL:
        return "bridged"
    return f"refused: {_NOT_TRIED if bridge.has(architecture) else 'it is not known here'}"


def _unsupported(architecture: str, table: Mapping[str, Any]) -> str:
    reason = f": {REFUSED[architecture]}" if architecture in REFUSED else ""
    if not reason and not bridge.installed():
        reason = f"; {_NEEDS_EXTRA}"
    return (
        f"the architecture {architecture!r} is not supported{reason}. Supported: {', '.join(sorted(table))}. "
        f"A package can add others through the entry-point group {ENTRY_POINTS!r}."
    )
