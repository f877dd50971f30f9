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
from models.family import Family
from models.refused import REFUSED

ENTRY_POINTS = "jaxserve.models"


@functools.cache
def families() -> tuple[Family, ...]:
    """Every family that can be loaded: ours by name, then installed ones. An installed one wins over ours."""
    found: list[Family] = []
    for module in sorted(info.name for info in pkgutil.iter_modules(ours.__path__)):
        found.extend(importlib.import_module(f"{ours.__name__}.{module}").FAMILIES)
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        loaded = entry.load()
        found.extend([loaded] if isinstance(loaded, Family) else loaded)
    return tuple(found)


def find(architecture: str) -> Family:
    """The family of an `architectures` entry of config.json.

    Raises:
        ValueError: it is not supported; the message lists what is.
    """
    table = {name: family for family in families() for name in family.architectures}
    if architecture not in table:
        raise ValueError(_unsupported(architecture, table))
    return table[architecture]


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
    """ "native", or why the architecture is refused, in a sentence."""
    if any(architecture in family.architectures for family in families()):
        return "native"
    return f"refused: {REFUSED.get(architecture, 'it is not known here')}"


def _unsupported(architecture: str, table: Mapping[str, Any]) -> str:
    reason = f": {REFUSED[architecture]}" if architecture in REFUSED else ""
    return (
        f"the architecture {architecture!r} is not supported{reason}. Supported: {', '.join(sorted(table))}. "
        f"A package can add others through the entry-point group {ENTRY_POINTS!r}."
    )
