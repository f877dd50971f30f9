"""Flags made from the settings of `EngineConfig`: names, kinds, defaults and help are declared there, once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from serving.engine.api.config import EngineConfig
from serving.engine.api.settings import SECTIONS, SWITCH, Kind, RefusedError, Setting, settings_of

SETTINGS = settings_of(EngineConfig)


def add_engine_flags(parser: argparse.ArgumentParser, repeated: Collection[str] = ()) -> None:
    """The flags that say what is served, and how.

    Args:
        repeated: settings whose flags may be given several times; their value is a list then.
    """
    defaults = vars(EngineConfig())
    for section in SECTIONS:
        add_settings(
            parser.add_argument_group(section),
            {name: defaults[name] for name, known in SETTINGS.items() if known.section == section and known.flag},
            repeated=repeated,
        )


def add_settings(
    group: Any, defaults: Mapping[str, Any], help: Mapping[str, str] | None = None, repeated: Collection[str] = ()
) -> None:
    """Flags for some settings of `EngineConfig`, where `dest` is the setting's name.

    Args:
        group: a parser, or a group of one.
        defaults: setting -> what it is when the flag is left out.
        help: setting -> another help than the setting's own.
        repeated: as for `add_engine_flags`.
    """
    for name, default in defaults.items():
        known = SETTINGS[name]
        words = (help or {}).get(name, known.help)
        options: dict[str, Any] = {"dest": name, "default": default, "help": words}
        if known.kind is SWITCH:
            options["action"] = argparse.BooleanOptionalAction
        elif known.kind.choices:
            options["choices"] = known.kind.choices
        else:
            options |= {"type": reader(known.kind), "metavar": known.kind.metavar}
        if name in repeated:
            options["action"] = "append"
        if known.refusable and known.flag:
            twin: dict[str, Any] = {"dest": name, "action": "store_const", "const": "", "default": argparse.SUPPRESS}
            group.add_argument(f"--no-{known.flag[2:]}", **twin, help=f'the same as {known.flag} ""')
        group.add_argument(known.flag, **options)


def reader(kind: Kind) -> Callable[[str], Any]:
    """What argparse reads a flag's value with."""

    def read(text: str) -> Any:
        try:
            return kind.read(text)
        except RefusedError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except (ValueError, TypeError):
            raise argparse.ArgumentTypeError(f"must be {kind.what}; got {text!r}.") from None

    return read


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine's part of parsed flags. The names of the model belong to the service.

    Raises:
        ValueError: values that contradict each other or are out of range, in a sentence.
    """
    names = [name for name, known in SETTINGS.items() if known.flag and hasattr(args, name)]
    return EngineConfig(**{name: getattr(args, name) for name in names})


def shown(name: str, value: Any) -> str:
    """A flag's value as start-up shows it, with its unit."""
    known: Setting | None = SETTINGS.get(name)
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return f"{value} {known.unit}" if known is not None and known.unit else str(value)


def in_flags(sentence: str, names: Collection[str]) -> str:
    """A sentence about settings by the names of their fields, with the flags' names instead: what a person at a command line
    has given, and can change.

    Args:
        names: the `dest` of every flag. Those of one word are looked for at the beginning alone: "model" is also a word.
    """
    flags = {
        name: (SETTINGS[name].flag if name in SETTINGS else None) or "--" + name.replace("_", "-") for name in names
    }

    def flag(match: re.Match[str]) -> str:
        name = match[0]
        return flags[name] if name in flags and ("_" in name or match.start() == 0) else name

    return re.sub(r"(?<![\w-])[a-z]+(?:_[a-z]+)*(?=[ ,;:.]|$)", flag, sentence)
