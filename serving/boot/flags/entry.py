"""What flags and a file say about several models in one server: `--model` more than once, or `--models FILE`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from serving.boot.engine_flags import SETTINGS
from serving.boot.flags.file import read_models_file
from serving.boot.lora_modules import lora_module
from serving.engine.api.adapters import LoRARequest
from serving.engine.api.config import EngineConfig

MAX_NAME_CHARS = 256
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*(?:/[A-Za-z0-9][A-Za-z0-9._:-]*)*")
_OWN = (
    "name",
    "aliases",
    "pinned",
    "load",
    "keep_alive",
    "sleep_level",
    "tenants",
    "tool_call_parser",
    "reasoning_parser",
    "lora_modules",
)
_WHOLE_SERVER = (
    "served_model_name", "mesh", "cpu_devices", "coordinator", "num_processes", "process_id", "step_timeout", "progress",
    "role", "kv_transfer_config", "default_mm_loras",
)  # fmt: skip
"""Settings that are the server's, or that an entry says in another way."""


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """One of several models.

    Attributes:
        name: what answers carry.
        config: what its engine is started with.
        aliases: further names.
        pinned: it is loaded at the start, and gives way to no other.
        load: it is loaded at the start, where there is room; the first one is in any case.
        keep_alive: seconds without requests after which it sleeps; None: when another needs the memory.
        sleep_level: 1 keeps its weights in host memory, 2 reads them again on waking; None is what the platform calls for.
        tenants: names of the API keys that may use it; None: all may.
        tool_call_parser, reasoning_parser: as the flags.
        lora_modules: its adapters, which are read once it is loaded and a request names them.
    """

    name: str
    config: EngineConfig
    aliases: tuple[str, ...] = ()
    pinned: bool = False
    load: bool = False
    keep_alive: float | None = None
    sleep_level: int | None = None
    tenants: tuple[str, ...] | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    lora_modules: tuple[LoRARequest, ...] = ()

    def level(self, platform: str) -> int:
        """How it sleeps: on a CPU weights that are kept give nothing back."""
        return self.sleep_level or (2 if platform == "cpu" else 1)


def named_model(text: str) -> tuple[str | None, str]:
    """`name=path` as the two; anything else, and a path that has a '=' itself, is a model without a name of its own."""
    name, separator, path = text.partition("=")
    if separator and path and is_model_name(name) and not pathlib.Path(text).exists():
        return name, path
    return None, text


def is_model_name(name: object) -> bool:
    """Letters, digits, '.', '_', ':' and '-', in parts that '/' divides."""
    return isinstance(name, str) and len(name) <= MAX_NAME_CHARS and _NAME.fullmatch(name) is not None


def entries_of(args: argparse.Namespace, config: EngineConfig) -> tuple[ModelEntry, ...]:
    """The models of parsed flags, where they are several or come from a file; empty for a server of one model.

    Args:
        config: of the flags: what an entry leaves open.
    Raises:
        ValueError: entries that contradict each other or cannot be, in a sentence.
    """
    given: list[tuple[Mapping[str, Any], pathlib.Path | None]] = []
    if args.models is not None:
        file = read_models_file(args.models)
        given += [(one, file.folder) for one in file.entries]
    if len(args.model_given) > 1 or (given and args.model_given):
        given += [({"name": name, "model": model}, None) for name, model in map(named_model, args.model_given)]
    if not given:
        return ()
    if config.role is not None or config.kv_transfer_config is not None:
        raise ValueError(
            "role and kv_transfer_config are for one model: start a server for each that gives or takes pages."
        )
    if config.coordinator is not None:
        raise ValueError("coordinator is for one model: several in one server run in a single process.")
    if args.lora_modules or args.lora_resolver or args.default_mm_loras:
        raise ValueError(
            "lora_modules, default_mm_loras and lora_resolver are for one model as flags: of several, each has its lora_modules in "
            "the file of models (--models FILE), or load adapters while the server runs."
        )
    if args.served_model_name:
        raise ValueError("served_model_name is for one model: of several, each has its name and aliases.")
    entries = tuple(_entry(one, config, folder) for one, folder in given)
    _check_names(entries)
    return entries


def _entry(given: Mapping[str, Any], config: EngineConfig, folder: pathlib.Path | None) -> ModelEntry:
    found = {str(key).replace("-", "_"): value for key, value in given.items()}
    if "path" in found:
        found.setdefault("model", found.pop("path"))
    model = found.get("model")
    name = found.get("name") or _name_of(model)
    if not is_model_name(name):
        raise ValueError(
            f"models: a name must be letters, digits, '.', '_', ':' and '-', in parts that '/' divides; got {name!r}."
        )
    known = [*_OWN, *(key for key, known in SETTINGS.items() if known.flag and key not in _WHOLE_SERVER)]
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(
                f"models: {name} has {key!r}, which is no setting of a model" + (f"; {near[0]}?" if near else ".")
            )
    if folder is not None and isinstance(model, str) and (folder / model).exists():
        found["model"] = str(folder / model)
    own = {key: found.pop(key) for key in _OWN if key in found}
    try:
        engine = dataclasses.replace(config, **{"model": None, **found, "served_model_name": name})
        adapters = _adapters(own.get("lora_modules"), folder)
        if adapters and not engine.enable_lora:
            raise ValueError("lora_modules are for a model that takes adapters: it needs enable_lora too.")
        return ModelEntry(**{**own, "name": name, "config": engine, **_checked(own), "lora_modules": adapters})
    except ValueError as error:
        raise ValueError(f"models: {name}: {error}") from None


def _adapters(given: Any, folder: pathlib.Path | None) -> tuple[LoRARequest, ...]:
    """An entry's adapters: a list of what `--lora-modules` takes, or of objects, or an object of paths by their names.

    Raises:
        ValueError: one that cannot be, in words.
    """
    if isinstance(given, Mapping):
        given = [{"name": name, "path": path} for name, path in given.items()]
    if given is not None and (isinstance(given, str) or not isinstance(given, Sequence)):
        raise ValueError(f"lora_modules must be a list of name=path, or of objects with name and path; got {given!r}.")
    found = []
    for one in given or ():
        if isinstance(one, str):
            name, separator, path = one.partition("=")
            one = {"name": name, "path": path} if separator else {}
        path = one.get("path") if isinstance(one, Mapping) else None
        if folder is not None and isinstance(path, str) and path and (folder / path).exists():
            one = {**one, "path": str(folder / path)}
        try:
            found.append(lora_module(json.dumps(one)))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"lora_modules: each {error}") from None
    return tuple(found)


def _checked(own: Mapping[str, Any]) -> dict[str, Any]:
    """An entry's own fields, as they are kept.

    Raises:
        ValueError: one that cannot be, in words.
    """
    out: dict[str, Any] = {}
    for key in ("aliases", "tenants"):
        value = own.get(key)
        if value is None:
            continue
        if (
            isinstance(value, str)
            or not isinstance(value, Sequence)
            or not all(isinstance(one, str) and one for one in value)
        ):
            raise ValueError(f"{key} must be a list of names, got {value!r}.")
        if key == "aliases" and not all(map(is_model_name, value)):
            raise ValueError(f"aliases must be names as models have, got {value!r}.")
        out[key] = tuple(value)
    for key in ("pinned", "load"):
        if not isinstance(own.get(key, False), bool):
            raise ValueError(f"{key} must be true or false, got {own[key]!r}.")
    keep = own.get("keep_alive")
    if keep is not None:
        if isinstance(keep, bool) or not isinstance(keep, int | float):
            raise ValueError(f"keep_alive must be seconds, got {keep!r}.")
        out["keep_alive"] = float(keep) if keep >= 0 else None
    if own.get("sleep_level") not in (None, 1, 2):
        raise ValueError(f"sleep_level must be 1 or 2, got {own['sleep_level']!r}.")
    return out


def _name_of(model: Any) -> str:
    """What a model is called that has no name: its file's or folder's, without the ending."""
    if model is None:
        return "default-model"
    if not isinstance(model, str):
        raise ValueError(f"models: model must be a file, a folder or a hub id; got {model!r}.")
    path = pathlib.Path(model)
    last = path.name.removesuffix(".gguf") if path.exists() or model.endswith(".gguf") else model
    return re.sub(r"[^A-Za-z0-9._:/-]+", "-", last).strip("-")


def _check_names(entries: Sequence[ModelEntry]) -> None:
    """Raises ValueError where two would answer to one name."""
    owner: dict[str, str] = {}
    for entry in entries:
        for name in (entry.name, *entry.aliases, *(one.lora_name for one in entry.lora_modules)):
            if name in owner or name == "default":
                whose = f"{owner[name]!r} answers to it already" if name in owner else "it means the first one"
                raise ValueError(
                    f"models: {entry.name!r} cannot be called {name!r}: {whose}. Give each a name of its own: name=path."
                )
            owner[name] = entry.name
