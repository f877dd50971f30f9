"""Adapters in whatever form they come, and where they are."""

from __future__ import annotations

from pathlib import Path

from models.adapters.adapter import Adapter, Base
from models.adapters.gguf import read_gguf
from models.adapters.peft import check_within, read_peft
from models.loading import hub


def read_adapter(path: Path, base: Base, within: Path | None = None) -> Adapter:
    """Reads an adapter.

    Args:
        path: a directory that peft wrote; a GGUF file, or a directory with one and no `adapter_config.json`.
        base: of the served model.
        within: a folder that no file may lead out of, by links neither; None: wherever they lie.
    Raises:
        ValueError: it is not there, damaged, or of a kind that cannot be served beside its base, in a sentence.
    """
    if path.is_dir() and not (path / "adapter_config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise ValueError(f"{path} holds {len(files)} GGUF files; name one: {files[0].name}, ...")
        path = files[0] if files else path
    if path.is_file():
        check_within(path, within)
        return read_gguf(path, base)
    return read_peft(path, within, base)


def locate(path: str) -> Path:
    """Where an adapter lies on this machine: a path as it is; of a hub id (owner/name, owner/name:FILE.gguf) where its files are
    in the local cache, fetched where they were not.

    Raises:
        ValueError: there is nothing under that name.
    """
    found = Path(path).expanduser()
    if found.exists() or not hub.looks_like_hub_id(path):
        return found
    return hub.fetch(path, adapter=True)
