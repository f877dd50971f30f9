"""jaxserve pull | list | rm: the models in this user's caches, the hub's and our own."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Cached:
    """A model that is there.

    Attributes:
        name: what `--model` takes for it; the default model goes by its own name.
        size: bytes on disk.
        paths: what is removed with it.
    """

    name: str
    size: int
    paths: tuple[pathlib.Path, ...]


def cached_models() -> list[Cached]:
    """All of them, by name."""
    return sorted([*_default_model(), *_hub_models()], key=lambda one: one.name)


def _default_model() -> list[Cached]:
    from models.loading.default_model import FILE_NAME, MODEL_ID, cache_dir

    file = cache_dir() / "models" / FILE_NAME
    return [Cached(MODEL_ID, file.stat().st_size, (file,))] if file.is_file() else []


def _hub_models() -> list[Cached]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    models = [repo for repo in repos if repo.repo_type == "model"]
    return [Cached(repo.repo_id, repo.size_on_disk, (pathlib.Path(repo.repo_path),)) for repo in models]


def main(argv: Sequence[str], word: str) -> int:
    """Does one of the three words. Returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"jaxserve {word}")
    if word == "list":
        parser.parse_args(argv)
        return _list()
    parser.add_argument("name", help="as --model takes it: a hub id (owner/name, owner/name:Q4_K_M), or `default`")
    if word == "rm":
        parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    args = parser.parse_args(argv)
    return _pull(args.name) if word == "pull" else _remove(args.name, args.yes)


def _pull(name: str) -> int:
    from models.loading.source import resolve

    source = resolve(None if name == "default" else name)
    print(source.path)
    return 0


def _list() -> int:
    found = cached_models()
    if not found:
        print("no models are cached: `jaxserve pull NAME` fetches one, and so does `jaxserve serve --model NAME`.")
    for one in found:
        print(f"{shown(one.size):>9}  {one.name}")
    return 0


def _remove(name: str, sure: bool) -> int:
    from models.loading.default_model import MODEL_ID

    wanted = MODEL_ID if name == "default" else name.split(":", 1)[0]
    one = next((one for one in cached_models() if one.name == wanted), None)
    if one is None:
        raise ValueError(f"{name} is not cached; `jaxserve list` shows what is.")
    if not sure:
        print(f"remove {one.name} ({shown(one.size)})? [y/N] ", end="", flush=True, file=sys.stderr)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            return 1
    for path in one.paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    print(f"removed {one.name}, {shown(one.size)}")
    return 0


def shown(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
