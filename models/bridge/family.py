"""The bridge as the registry sees it: a family for whatever architecture has none, and where traces are kept."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import platformdirs

from models.bridge import aten
from models.bridge.graph import Trace
from models.bridge.module import BridgedDecoder
from models.config import ModelConfig, MoEConfig
from models.family import Family
from models.layers import Build

EXTRA = "transformers"
"""The extra that the bridge needs."""
_NEEDS = ("torch", "transformers")
_SOURCES = (
    "cuts.py", "graph.py", "masks.py", "record.py", "scores.py", "stand_ins.py", "tensors.py", "tracing.py", "written_out.py",
)  # fmt: skip
_traces: dict[str, tuple[str, Trace]] = {}
"""Digest of a trace -> (the config.json that it was made of, the trace)."""


def installed() -> bool:
    """Whether there is what the bridge needs. Imports none of it."""
    return all(importlib.util.find_spec(name) is not None for name in _NEEDS)


def has(architecture: str) -> bool:
    """Whether the transformers that is installed has a model of that name for texts. Reads its list as text: importing it takes
    seconds."""
    return installed() and f'"{architecture}"' in _listed()


@functools.cache
def _listed() -> str:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def bridged(architecture: str) -> Family:
    """A family for an architecture that has none here. Whether it can be served is found out with its configuration."""
    name = f"{architecture} (transformers' code)"
    return Family(name, (architecture,), functools.partial(_config, architecture), _build, traced=True)


def _config(architecture: str, hf: Mapping[str, Any]) -> ModelConfig:
    trace = trace_of(hf, "float32")
    facts = trace.facts
    return ModelConfig(
        architecture=architecture,
        vocab_size=facts["vocab_size"],
        num_layers=facts["num_layers"],
        embed_dim=facts["embed_dim"],
        ffw_dim=0,
        num_heads=facts["num_kv_heads"] * max(1, facts["num_heads"] // facts["num_kv_heads"]),
        num_kv_heads=facts["num_kv_heads"],
        head_dim=facts["head_dim"],
        max_positions=facts["max_positions"],
        norm_eps=0.0,
        tie_embeddings=facts["tied"],
        moe=None if facts["moe"] is None else MoEConfig(*facts["moe"]),
        extra=(("trace", trace.digest),),
    )


def _build(config: ModelConfig, build: Build) -> BridgedDecoder:
    said, trace = _traces[config.get("trace")]
    if (dtype := str(jnp.dtype(build.compute_dtype))) != "float32":
        trace = trace_of(json.loads(said), dtype)
    return BridgedDecoder(config, build, trace)


def trace_of(hf: Mapping[str, Any], dtype: str) -> Trace:
    """The trace of a configuration: out of the cache, or made in a process of its own.

    Raises:
        ValueError: transformers' code of it cannot be served, and why.
    """
    said = json.dumps(hf, sort_keys=True, default=str)
    path = folder() / f"{_key(said, dtype)}.trace"
    trace = _kept(path)
    if trace is None:
        trace = _made(hf["architectures"][0], said, dtype, path)
    _traces[trace.digest] = (said, trace)
    return trace


def folder() -> Path:
    """Where traces are kept."""
    return Path(os.environ.get("JAXSERVE_CACHE") or platformdirs.user_cache_dir("jaxserve")) / "traces"


def _key(said: str, dtype: str) -> str:
    """Of everything that decides a trace: the configuration, the code that is recorded, and the code that records."""
    h = hashlib.sha256(f"{said}\0{dtype}".encode())
    for name in _NEEDS:
        try:
            h.update(f"{name} {importlib.metadata.version(name)}".encode())
        except importlib.metadata.PackageNotFoundError:
            h.update(name.encode())
    for name in _SOURCES:
        h.update((Path(__file__).parent / name).read_bytes())
    return h.hexdigest()[:40]


def _kept(path: Path) -> Trace | None:
    try:
        return Trace.from_bytes(path.read_bytes())
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None  # none, or torn


def _made(architecture: str, said: str, dtype: str, path: Path) -> Trace:
    data = ask(architecture, ["trace", dtype], said)
    trace = Trace.from_bytes(data)
    missing = unknown(trace)
    if missing:
        raise refusal(architecture, f"it uses operations that are not known here: {', '.join(missing)}")
    keep(path, data)
    return trace


def unknown(trace: Trace) -> list[str]:
    """Operations of a trace that there are none of here."""
    ops = {node.op for function in trace.functions for node in function.nodes}
    return sorted(op for op in ops if not op.startswith("jaxserve.") and not aten.known(op))


def refusal(architecture: str, reason: str) -> ValueError:
    """Why an architecture is not served."""
    return ValueError(
        f"{architecture} has no family here, and transformers' own code of it cannot be served: {reason}."
    )


def ask(architecture: str, command: list[str], said: str) -> bytes:
    """What a process with torch answers; see `__main__.py`.

    Raises:
        ValueError: it refuses, or fails.
    """
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        run = subprocess.run(
            [sys.executable, "-m", "models.bridge", *command, str(out)],
            input=said.encode(), capture_output=True, env=environment, check=False,
        )  # fmt: skip
        if run.returncode == 0 and out.exists():
            return out.read_bytes()
    if run.returncode == 3:
        raise refusal(architecture, run.stdout.decode().strip())
    last = run.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["without a word"]
    killed = " (killed: there may have been too little memory)" if run.returncode < 0 else ""
    raise refusal(architecture, f"the process that runs it failed{killed}: {last[0]}")


def keep(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all. A folder that cannot be written costs the next start time, never this one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_bytes(data)
        part.replace(path)
    except OSError:
        pass
