"""What `--model` may be, and where it leads."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path
from typing import Literal

from models.loading import hub
from models.loading.default_model import MODEL_ID, default_model
from models.loading.gguf.file import is_beside_a_model, split_paths

Kind = Literal["gguf", "hf", "orbax"]
MANIFEST = "jaxserve.json"
"""Names a directory as an Orbax checkpoint of ours."""


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A checkpoint on this machine.

    Attributes:
        kind: "gguf" (a file), "hf" (config.json and safetensors) or "orbax" (a directory that we wrote).
        path: the file or directory.
        name: the hub id, or the default model's name, where that is how it was asked for.
    """

    kind: Kind
    path: Path
    name: str | None = None


def resolve(
    model: str | None, *, revision: str | None = None, progress: bool = True, named: str = "--model"
) -> ModelSource:
    """Finds a model, fetching it where it has to be.

    Args:
        model: None for the default model; a GGUF file; a directory; or a hub id (owner/name, owner/name:Q4_K_M for a GGUF file).
        revision: of a hub id.
        named: what errors call the setting that names it.
    Raises:
        ValueError: there is nothing usable under that name; the message says what was looked for.
    """
    if model is None:
        return ModelSource("gguf", default_model(progress), MODEL_ID)
    path = Path(model).expanduser()
    if not _can_be(path):
        raise ValueError(f"{named} {model[:100]}...: no file has so long a name.")
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"GGUF":
            # Not resolved: the hub's cache has links to files without names, and the parts of a split model go by name.
            return ModelSource("gguf", path.absolute())
        raise ValueError(f"{named} {model}: the file is not a GGUF file (it does not start with 'GGUF').")
    if path.is_dir():
        return _directory(f"{named} {model}", path.resolve())
    if hub.looks_like_hub_id(model):
        found = hub.fetch(model, revision)
        source = ModelSource("gguf", found) if found.is_file() else _directory(f"{named} {model}", found)
        return dataclasses.replace(source, name=model)
    raise ValueError(
        f"{named} {model}: there is no such file or directory, and it is not a hub id (owner/name). Give a .gguf file, "
        "a directory with config.json and safetensors, a directory written by `python -m serving.convert`, or a hub id "
        "(owner/name, or owner/name:Q4_K_M for one of its GGUF files)."
    )


def _can_be(path: Path) -> bool:
    """Whether a file system takes the name: it raises for one that is too long, where for others it says that there is nothing."""
    try:
        path.is_file()
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    return True


def _directory(who: str, path: Path) -> ModelSource:
    if (path / MANIFEST).exists():
        return ModelSource("orbax", path)
    if (path / "config.json").exists() or (path / "params.json").exists():
        return ModelSource("hf", path)
    files = sorted(file for file in path.glob("*.gguf") if not is_beside_a_model(file.name))
    if len(files) == 1 or (files and set(files) <= set(split_paths(files[0]))):
        return ModelSource("gguf", files[0])
    if files:
        raise ValueError(f"{who}: the directory holds {len(files)} GGUF files; name one: {files[0].name}, ...")
    raise ValueError(f"{who}: the directory has neither config.json nor a GGUF file.")
