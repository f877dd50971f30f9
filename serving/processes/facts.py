"""What must be the same in every process of an engine, and the sentence for what is not."""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path

from serving.engine.api.config import EngineConfig
from serving.engine.api.settings import Scope, settings_of
from serving.installation import version

_SAMPLE = 1 << 20  # bytes of a file's beginning and end that its digest covers: headers and the last tensors


def facts(config: EngineConfig, model: Path) -> dict[str, str]:
    """Name -> value, of everything that decides which programs a process compiles and what they give."""
    import jax

    from serving.engine.device.programs.compiling import source_digest

    named = {
        known.flag or name: str(getattr(config, name))
        for name, known in settings_of(config).items()
        if known.scope in (Scope.PROGRAM, Scope.ENGINE)
    }
    return named | {
        "jaxserve's version": version(),
        "the code of jaxserve": source_digest(),
        "Python's version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "jax's version": jax.__version__,
        "jaxlib's version": importlib.metadata.version("jaxlib"),
        "the platform": jax.default_backend(),
        "the model's files": model_digest(model),
    }


def difference(process: int, theirs: Mapping[str, str], ours: Mapping[str, str]) -> str | None:
    """The first fact in which a process differs from process 0, as a sentence; None when there is none."""
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = theirs.get(name), ours.get(name)
        if a == b:
            continue
        if name.startswith("--"):
            return f"process {process} has {name} {a}, process 0 has {b}: start all with the same flags."
        if len(str(a)) > 24:
            return (
                f"{name} are not the same in process {process} as in process 0: install and copy the same everywhere."
            )
        return f"{name} is {a} in process {process} and {b} in process 0: install the same everywhere."
    return None


def model_digest(model: Path) -> str:
    """Digest of a model's files: their names, sizes, beginnings and ends. Where they lie does not matter."""
    h = hashlib.blake2b(digest_size=16)
    files = [model] if model.is_file() else sorted(p for p in model.rglob("*") if p.is_file())
    for path in files:
        name = "" if model.is_file() else path.relative_to(model).as_posix()
        size = path.stat().st_size
        h.update(f"{name}\0{size}\0".encode())
        with path.open("rb") as f:
            h.update(f.read(_SAMPLE))
            if size > 2 * _SAMPLE:
                f.seek(size - _SAMPLE)
                h.update(f.read(_SAMPLE))
    return h.hexdigest()
