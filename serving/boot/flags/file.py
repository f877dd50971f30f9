"""A file of models: YAML, JSON or TOML."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any

from serving.engine.api.settings import SIZE


@dataclasses.dataclass(frozen=True)
class ModelsFile:
    """What a file of models says beside its entries; None where it leaves that open."""

    entries: tuple[Mapping[str, Any], ...]
    memory: int | None = None
    folder: pathlib.Path | None = None


def read_models_file(path: str) -> ModelsFile:
    """A file of models: YAML, JSON or TOML, by its ending.

    Raises:
        ValueError: it cannot be read or is no such file, in a sentence.
    """
    where = pathlib.Path(path).expanduser()
    try:
        text = where.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"models {path}: cannot be read ({reason}).") from None
    found = _parsed(where, text)
    models = found.get("models") if isinstance(found, dict) else None
    if isinstance(models, dict):
        models = [
            {"name": name, **(settings or {})} for name, settings in models.items() if isinstance(settings, dict | None)
        ]
    if not isinstance(models, list) or not models or not all(isinstance(one, dict) for one in models):
        raise ValueError(f"models {path}: must have 'models', a list of objects or an object with one for each name.")
    unknown = sorted(found.keys() - {"models", "memory"})
    if unknown:
        raise ValueError(f"models {path}: there is no {unknown[0]!r}; beside 'models' there may be 'memory'.")
    try:
        budget = None if found.get("memory") is None else SIZE.read(found["memory"])
    except (ValueError, TypeError):
        raise ValueError(f"models {path}: memory must be {SIZE.what}; got {found['memory']!r}.") from None
    return ModelsFile(tuple(models), budget, where.resolve().parent)


def _parsed(where: pathlib.Path, text: str) -> Any:
    try:
        if where.suffix == ".toml":
            return tomllib.loads(text)
        if where.suffix == ".json":
            return json.loads(text)
        import yaml

        return yaml.safe_load(text)
    except (ValueError, RecursionError) as error:  # of toml and json
        raise ValueError(f"models {where}: {error}") from None
    except Exception as error:  # a yaml.YAMLError
        raise ValueError(f"models {where}: {' '.join(str(error).split())}") from None
