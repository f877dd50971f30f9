"""Configurations to plan with: files of this folder by name, a path, or a model that is here already."""

from __future__ import annotations

import pathlib
from typing import Any

from models.defaults import complete
from models.loading.hf_config import read_config_file

FOLDER = pathlib.Path(__file__).parent / "facts"


def known() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_config(model: str) -> dict[str, Any]:
    """A Hugging Face configuration as a dictionary.

    Args:
        model: a name of `known()` in any case ("Llama-3.1-70B"), a config.json, a folder with one, or a model id or
            GGUF file as the server takes them.
    Raises:
        ValueError: nothing of that name.
    """
    by_name = {name.lower(): name for name in known()}
    short = model.rsplit("/", 1)[-1].lower().removesuffix("-instruct").removesuffix("-it")
    path = pathlib.Path(model)
    if short in by_name and not path.exists():
        path = FOLDER / f"{by_name[short]}.json"
    if path.is_dir() and (path / "config.json").exists():
        path = path / "config.json"
    if path.suffix == ".json" and path.exists():
        # Complete, as a server reads it; without weights to look at the family says whether the head is the table.
        return complete(read_config_file(path))
    from models.loading.opening import open_checkpoint
    from models.loading.source import resolve

    try:
        return open_checkpoint(resolve(model)).hf_config
    except (ValueError, OSError) as e:
        raise ValueError(
            f"No configuration for the model {model!r}: it is no file, and not one of {', '.join(known())}. ({e})"
        ) from e
