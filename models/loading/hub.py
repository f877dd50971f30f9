"""Checkpoints by their Hugging Face hub id: only the files that are needed, with huggingface_hub's progress, resuming and cache.

`owner/name` is a repository. Of one that holds GGUF files, `owner/name:Q4_K_M` is the one quantized so, and `owner/name:FILE.gguf`
or `owner/name/FILE.gguf` the one of that name.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from models.loading.gguf.file import is_beside_a_model, split_paths

T = TypeVar("T")

ENDPOINT: str | None = None
"""The hub's address; None for huggingface_hub's own, which the environment's HF_ENDPOINT sets."""

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+?)(?:[:/](?P<part>[\w.-]+(?:/[\w.-]+)*))?")
_SMALL = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken", "*.py.txt")
_OF_ADAPTERS = (*_SMALL, "adapter_model.safetensors")
_NOT_WEIGHTS = ("adapter_", "optimizer", "training_", "consolidated")


def looks_like_hub_id(text: str) -> bool:
    """Whether `text` has the form owner/name, perhaps with a GGUF file or quantization behind it."""
    match = _HUB_ID.fullmatch(text)
    return bool(match) and (":" in text or match["part"] is None or match["part"].endswith(".gguf"))


def fetch(hub_id: str, revision: str | None = None, adapter: bool = False) -> Path:
    """The local directory of a hub checkpoint, or its GGUF file; downloads what is missing of what is needed.

    Args:
        adapter: the repository is one of an adapter, not of a model.

    Raises:
        ValueError: it is not cached and could not be downloaded, or holds several models; the message says what to do.
    """
    import httpx
    import huggingface_hub

    match = _HUB_ID.fullmatch(hub_id)
    assert match is not None
    repo, part = match["repo"], match["part"]
    try:
        names = _names(huggingface_hub.HfApi(endpoint=ENDPOINT), repo, revision)
    except (OSError, httpx.TransportError) as error:
        reason = _refused(error)
        if reason is not None:
            raise _not_fetched(hub_id, reason) from None
        folder, offline = _cached(repo, revision), True
        if folder is None:
            raise _not_fetched(
                hub_id, "the hub cannot be reached, and the checkpoint is not in the local cache"
            ) from None
        names = {path.relative_to(folder).as_posix(): 0 for path in folder.rglob("*") if path.is_file()}
    else:
        folder, offline = None, False
    if adapter and part is None and "adapter_config.json" in names:
        wanted = [
            name for name in names if "/" not in name and any(fnmatch.fnmatch(name, kind) for kind in _OF_ADAPTERS)
        ]
    else:
        wanted = _wanted(hub_id, names, part, lambda name: _told(hub_id, lambda: _one(repo, name, revision, offline)))
    if folder is None:
        folder = _told(hub_id, lambda: _snapshot(repo, revision, wanted))
    ggufs = [name for name in wanted if name.endswith(".gguf")]
    return folder / ggufs[0] if ggufs else folder


def _cached(repo: str, revision: str | None) -> Path | None:
    """The folder of what was fetched of a repository before."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    name = folder / "refs" / (revision or "main")
    found = folder / "snapshots" / (name.read_text(encoding="utf-8").strip() if name.is_file() else revision or "main")
    return found if found.is_dir() else None


def _names(api: Any, repo: str, revision: str | None) -> dict[str, int]:
    """The repository's files, and their sizes in bytes."""
    info = api.model_info(repo, revision=revision, files_metadata=True)
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _snapshot(repo: str, revision: str | None, wanted: Collection[str]) -> Path:
    import huggingface_hub

    patterns = [_literally(name) for name in wanted]
    return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns, endpoint=ENDPOINT))


def _one(repo: str, name: str, revision: str | None, local: bool) -> Path:
    import huggingface_hub

    return Path(
        huggingface_hub.hf_hub_download(repo, name, revision=revision, local_files_only=local, endpoint=ENDPOINT)
    )


def _literally(name: str) -> str:
    """A pattern that only this name matches."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _wanted(hub_id: str, names: Mapping[str, int], part: str | None, download: Callable[[str], Path]) -> list[str]:
    """The files that are needed of a repository's: of a GGUF model its parts in order, else all of a directory.

    Args:
        names: the repository's files with their sizes.
        part: a quantization or file that was asked for.
        download: gives one file, whose content decides what else is needed.
    """
    ggufs = [name for name in names if name.endswith(".gguf") and not is_beside_a_model(name)]
    weights = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    if part is not None or (ggufs and not weights):
        return _gguf(hub_id, ggufs, names, part)
    small = [name for name in names if "/" not in name and any(fnmatch.fnmatch(name, kind) for kind in _SMALL)]
    # sentence-transformers: a folder a step, numbered.
    small += [name for name in names if re.match(r"\d+_\w+/[^/]+\.(json|safetensors)$", name)]
    if "jaxserve.json" in names:
        return list(names)
    index = "model.safetensors.index.json"
    if index in names:
        shards = json.loads(download(index).read_text(encoding="utf-8")).get("weight_map") or {}
        return [*small, *sorted(set(shards.values()) & names.keys())]
    if "model.safetensors" in weights:
        return [*small, "model.safetensors"]
    own = [name for name in weights if not name.startswith(_NOT_WEIGHTS)]
    own = own or [name for name in weights if name.startswith("consolidated")]
    if not own:
        pickles = [name for name in names if name.endswith((".bin", ".pth", ".pt"))]
        hint = f" {pickles[0]} is a pickle: convert it to safetensors." if pickles else ""
        raise ValueError(f"The repository {hub_id!r} has neither safetensors nor GGUF files.{hint}")
    return [*small, *sorted(own)]


def _gguf(hub_id: str, ggufs: Iterable[str], sizes: Mapping[str, int], part: str | None) -> list[str]:
    """The files of the one GGUF model that is meant."""
    models = _models(ggufs)
    if part is None:
        found = models
    elif part.endswith(".gguf"):
        found = {
            name: files for name, files in models.items() if part in files or part in {Path(f).name for f in files}
        }
    else:
        pattern = re.compile(rf"(?:^|[-._/]){re.escape(part)}(?:$|[-._/])", re.IGNORECASE)
        found = {name: files for name, files in models.items() if pattern.search(name.removesuffix(".gguf"))}
        exact = re.compile(rf"[-._/]{re.escape(part)}$", re.IGNORECASE)
        found = {n: f for n, f in found.items() if exact.search(n.removesuffix(".gguf"))} or found
    if len(found) == 1:
        return next(iter(found.values()))
    repo = hub_id.partition(":")[0] if part is None or ":" in hub_id else hub_id.removesuffix(f"/{part}")
    if not models:
        raise ValueError(f"The repository {repo!r} has no GGUF file.")
    listed = found or models
    lines = [
        f"  {repo}:{_quantization(name)}  {sum(sizes[f] for f in files) / 1e9:.1f} GB" for name, files in listed.items()
    ]
    what = (
        f"holds {len(listed)} GGUF models"
        if part is None or found
        else f"has no GGUF file {part!r}; it holds {len(listed)}"
    )
    raise ValueError(f"The repository {repo!r} {what}; name one:\n" + "\n".join(lines))


def _models(ggufs: Iterable[str]) -> dict[str, list[str]]:
    """Models by their name without the part's number, each with its files in order."""
    models: dict[str, list[str]] = {}
    for name in sorted(ggufs):
        parts = [path.as_posix() for path in split_paths(Path(name))]
        base = re.sub(r"-\d{5}-of-\d{5}(?=\.gguf$)", "", name)
        models.setdefault(base, parts if name == parts[0] else [name])
    return models


def _quantization(name: str) -> str:
    """How a GGUF model's name says that it is quantized; else its file's name."""
    stem = Path(name).name.removesuffix(".gguf")
    found = re.search(r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|NVFP4\w*|BF16|F16|F32))$", stem, re.IGNORECASE)
    return found[1] if found else Path(name).name


def _told(hub_id: str, download: Callable[[], T]) -> T:
    """What `download` gives; what hinders it as a sentence."""
    import httpx
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return download()
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached, and the checkpoint is not in the local cache"
    except (OSError, httpx.TransportError) as error:
        reason = _refused(error) or f"the hub cannot be reached ({error})"
    raise _not_fetched(hub_id, reason)


def _refused(error: Exception) -> str | None:
    """What the hub answered, where it did; None where it could not be asked."""
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if not isinstance(error, HfHubHTTPError):
        return None
    status = getattr(error.response, "status_code", None)
    if status is not None and status >= 500:
        return None
    known = {401: "it does not exist or needs a login", 403: "access is refused", 404: "it does not exist"}
    return known.get(status or 0, f"the hub answered {status}")


def _not_fetched(hub_id: str, reason: str) -> ValueError:
    return ValueError(
        f"The checkpoint {hub_id!r} could not be fetched: {reason}. Check the name, log in with `hf auth login` if it is "
        "gated, or copy it here by other means and pass --model with its directory or GGUF file."
    )
