"""What is known of a setting beside its type and default. Flags, arguments, checks and what decides a program are made from it."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import re
from collections.abc import Callable
from typing import Any

SECTIONS = ("model", "engine", "images", "adapters", "devices")
"""Headings that settings stand under where they are listed."""


SHOWN_CHARS = 200
"""Of a value that is refused, at most so much is told."""


class RefusedError(ValueError):
    """A value that a kind explains itself: its text is the whole reason."""


class Scope(enum.Enum):
    """Whom a setting concerns, where an engine is several processes."""

    PROGRAM = "decides what is compiled; the same in every process"
    ENGINE = "the same in every process"
    SERVER = "only the process that schedules makes use of it"
    PROCESS = "each process's own"


@dataclasses.dataclass(frozen=True)
class Kind:
    """What values a setting takes.

    Attributes:
        what: the values in words, after "must be".
        read: from a value or its text to the value. Raises ValueError or TypeError for any other.
        metavar: stands for a value in help; None where `choices` or a switch say it.
        choices: the only values there are.
    """

    what: str
    read: Callable[[Any], Any]
    metavar: str | None = None
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a field of a configuration is.

    Attributes:
        help: what it does; with "(default: ...)" where the default is decided at start.
        kind: what it may be, None aside where that is the default.
        scope: whom it concerns.
        section: of SECTIONS.
        flag: its name on command lines; None for none.
        unit: of its number, to be shown behind it.
        refusable: whether the flag has a twin, --no-..., which gives "".
        bundled: whether a bundle of compiled programs decides it; see serving/engine/device/programs/bundle.py.
    """

    help: str
    kind: Kind
    scope: Scope
    section: str = "engine"
    flag: str | None = None
    unit: str = ""
    bundled: bool = False
    refusable: bool = False


def setting(default: Any, help: str, kind: Kind, scope: Scope, **more: Any) -> Any:
    """A dataclass field with a `Setting`; `more` are its further attributes. `flag=""` is made from the field's name."""
    return dataclasses.field(default=default, metadata={"setting": Setting(help, kind, scope, **more)})


def settings_of(config: Any) -> dict[str, Setting]:
    """Field name -> setting, of a configuration or its class, in the order of declaration."""
    return {
        field.name: _named(field.name, field.metadata["setting"])
        for field in dataclasses.fields(config)
        if "setting" in field.metadata
    }


def _named(name: str, found: Setting) -> Setting:
    return dataclasses.replace(found, flag=flag_of(name)) if found.flag == "" else found


def flag_of(name: str) -> str:
    """`max_model_len` -> `--max-model-len`."""
    return "--" + name.replace("_", "-")


def read_all(config: Any) -> None:
    """Reads every field of a frozen configuration as its kind does, text included: what a `__post_init__` calls.

    Raises:
        ValueError: naming the setting, what it must be and what it was.
    """
    for field in dataclasses.fields(config):
        found: Setting | None = field.metadata.get("setting")
        value = getattr(config, field.name)
        if found is None or (value is None and field.default is None):
            continue
        try:
            read = found.kind.read(value)
        except RefusedError as error:
            raise ValueError(f"{field.name}: {error}") from None
        except (ValueError, TypeError, OverflowError, RecursionError):
            raise ValueError(f"{field.name} must be {found.kind.what}; got {shown(value)}.") from None
        object.__setattr__(config, field.name, read)


def shown(value: Any) -> str:
    """A value as a sentence about it has it: not all of a long one, and of one that Python does not write (a number of thousands
    of digits, lists without end) its type."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "..."


# -- kinds -----------------------------------------------------------------------------------------------------------------


def one_of(*allowed: str, none: str | None = None) -> Kind:
    """One of some words.

    Args:
        none: the word that None, given in Python, stands for.
    """

    def read(value: Any) -> str:
        value = none if value is None else value
        if value not in allowed:
            raise ValueError
        return value

    return Kind(f"one of {', '.join(allowed)}", read, choices=allowed)


def _whole(least: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or (not isinstance(value, str) and int(value) != value):
            raise TypeError
        number = int(value)
        if not least <= number < 2**62:
            raise ValueError
        return number

    return read


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    number = float(value)
    if not 0 <= number < 1e9:
        raise ValueError
    return number


def _share(value: Any) -> float:
    share = _number(value)
    if not 0 < share <= 1:
        raise ValueError
    return share


def _page(value: Any) -> int:
    size = _whole(8)(value)
    if size > 256 or size & (size - 1):
        raise ValueError
    return size


def _text(value: Any) -> str:
    if not isinstance(value, str | os.PathLike):
        raise TypeError
    return str(value)  # pyright: ignore[reportUnknownArgumentType] - what a path is a path of is open


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40,
}  # fmt: skip


def read_size(value: Any) -> int:
    """Bytes, from a number or a text such as 4GiB, 1.5g or 500MB. Raises ValueError or TypeError for what is none."""
    if not isinstance(value, str):
        return _whole(1)(value)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].lower() not in UNITS:
        raise ValueError
    size = int(float(match[1]) * UNITS[match[2].lower()])
    if size < 1:
        raise ValueError
    return size


def read_json_text(value: Any) -> str:
    """A JSON object's text, from itself or from a dict. Raises ValueError or TypeError for what is none."""
    text = json.dumps(value) if isinstance(value, dict) else _text(value)
    if not isinstance(json.loads(text), dict):
        raise TypeError
    return text


COUNT = Kind("a whole number of at least 1", _whole(1), "N")
INDEX = Kind("a whole number of at least 0", _whole(0), "I")
WHOLE = Kind("a whole number", _whole(-(2**62)), "N")
SIZE = Kind("a size such as 4GiB, 500MB or a number of bytes", read_size, "SIZE")
PAGE = Kind("a power of two from 8 to 256", _page, "N")
SHARE = Kind("a share, more than 0 and at most 1", _share, "SHARE")
SECONDS = Kind("seconds, at least 0", _number, "S")
GIBIBYTES = Kind("a number of GiB, at least 0", _number, "GIB")
SWITCH = Kind("true or false", _switch)
TEXT = Kind("a text", _text, "TEXT")
NAME = Kind("a name", _text, "NAME")
FILE = Kind("a file or its text", _text, "FILE")
FOLDER = Kind("a folder", _text, "DIR")
