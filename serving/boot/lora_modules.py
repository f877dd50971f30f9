"""What flags say about adapters: those that a server starts with, where admins may load more from, who finds others."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.engine.api.adapters import LoRARequest

if TYPE_CHECKING:
    from serving.engine.api.config import EngineConfig
    from serving.service.adapters import Adapters, Resolver

ENTRY_POINTS = "jaxserve.lora_resolvers"
"""The group of entry points in which packages add resolvers: each a `Resolver`, or a class or function that makes one."""

FOLDER = "folder"
"""The resolver that comes with the server."""


def lora_module(text: str) -> LoRARequest:
    """`name=path`, or a JSON object with `name`, `path` and, where not all keys may use it, `tenants`: the names of those that
    may. vLLM's `base_model_name` is taken and not looked at.

    Raises:
        argparse.ArgumentTypeError: neither, or there is nothing at that path.
    """
    tenants: Any = None
    if text.lstrip().startswith("{"):
        try:
            given = json.loads(text)
            name, path, tenants = given["name"], given["path"], given.get("tenants")
        except (json.JSONDecodeError, KeyError, RecursionError):
            raise argparse.ArgumentTypeError(f"must be name=path or JSON with name and path; got {text!r}.") from None
    else:
        name, separator, path = text.partition("=")
        if not separator:
            raise argparse.ArgumentTypeError(f"must be name=path or JSON with name and path; got {text!r}.")
    if not isinstance(name, str) or not isinstance(path, str) or not name or not path:
        raise argparse.ArgumentTypeError(f"must have a name and a path; got {text!r}.")
    if tenants is not None and not (
        isinstance(tenants, list) and tenants and all(isinstance(one, str) for one in tenants)
    ):
        raise argparse.ArgumentTypeError(f"tenants must be a list of names of keys; got {tenants!r}.")
    if not Path(path).expanduser().exists():
        from models.loading.hub import looks_like_hub_id

        if not looks_like_hub_id(path):
            raise argparse.ArgumentTypeError(f"names {path!r}, which is no directory, no file and no hub id.")
    return LoRARequest(name, 0, path, None if tenants is None else tuple(tenants))


def default_loras(config: EngineConfig) -> tuple[LoRARequest, ...]:
    """Of "image", "video" and "audio" the adapters of requests that bring one along, each with the kind as its name, as in vLLM.

    Raises:
        ValueError: there are others, there is nothing at a path, or no adapters are taken.
    """
    if (text := config.default_mm_loras) is None:
        return ()
    if not config.enable_lora:
        raise ValueError("default_mm_loras are for a model that takes adapters: it needs enable_lora too.")
    given = json.loads(text)
    if not given or not given.keys() <= {"image", "video", "audio"}:
        raise ValueError(
            f'default_mm_loras must be such as {{"audio": "PATH"}}, of image, video and audio; got {text!r}.'
        )
    try:
        return tuple(lora_module(json.dumps({"name": sense, "path": path})) for sense, path in given.items())
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"default_mm_loras: each {error}") from None


def add_default_loras(adapters: Adapters, config: EngineConfig) -> None:
    """Loads them, and has requests answered with them.

    Raises:
        ValueError, RequestError: one cannot be served, in a sentence.
    """
    for one in default_loras(config):
        adapters.load(one.lora_name, one.lora_path)
        adapters.by_sense = {**adapters.by_sense, one.lora_name: one.lora_name}


def lora_folder(args: argparse.Namespace) -> Path | None:
    """The folder of `--lora-folder`."""
    return None if args.lora_folder is None else Path(args.lora_folder).expanduser()


def check_lora(args: argparse.Namespace, has_keys: bool) -> None:
    """Whether the flags about adapters fit each other.

    Raises:
        ValueError: they do not, in a sentence.
    """
    if (args.lora_modules or args.lora_folder or args.lora_resolver or args.default_mm_loras) and not args.enable_lora:
        raise ValueError(
            "--lora-modules, --lora-folder, --lora-resolver and --default-mm-loras are for a server that takes adapters: give "
            "--enable-lora too."
        )
    if not has_keys and any(given.tenants is not None for given in args.lora_modules):
        raise ValueError("--lora-modules has tenants, and without API keys nobody is told from others: give some.")
    if args.lora_folder is not None and not lora_folder(args).is_dir():  # type: ignore[union-attr]
        raise ValueError(f"--lora-folder {args.lora_folder} is no directory.")
    resolvers_of(args)


def resolvers_of(args: argparse.Namespace) -> tuple[Resolver, ...]:
    """The resolvers that `--lora-resolver` names, in order.

    Raises:
        ValueError: there is none of that name, or it lacks what it needs.
    """
    found: list[Resolver] = []
    for name in args.lora_resolver:
        if name == FOLDER:
            folder = lora_folder(args)
            if folder is None:
                raise ValueError("--lora-resolver folder finds adapters below --lora-folder: give that too.")
            found.append(FolderResolver(folder))
            continue
        entries = list(importlib.metadata.entry_points(group=ENTRY_POINTS, name=name))
        if not entries:
            known = sorted({FOLDER, *(entry.name for entry in importlib.metadata.entry_points(group=ENTRY_POINTS))})
            raise ValueError(
                f"--lora-resolver: there is no resolver {name!r}. There are: {', '.join(known)}. A package can add others "
                f"through the entry-point group {ENTRY_POINTS!r}."
            )
        loaded = entries[0].load()
        found.append(loaded() if isinstance(loaded, type) or not hasattr(loaded, "resolve") else loaded)
    return tuple(found)


class FolderResolver:
    """Adapters below one folder, by their paths in it.

    Attributes:
        within: the folder; nothing outside it is read.
    """

    def __init__(self, folder: Path) -> None:
        self.within = folder.resolve()

    async def resolve(self, base_model: str, name: str) -> LoRARequest | None:
        """See Resolver.resolve."""
        path = (self.within / name).resolve()
        if not path.is_relative_to(self.within) or not (path / "adapter_config.json").is_file():
            return None
        return LoRARequest(name, 0, str(path))
