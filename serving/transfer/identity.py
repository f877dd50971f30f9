"""What two engines must have in common for a page of one to mean the same to the other."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

SAMPLES, SAMPLE_BYTES = 512, 4096
"""Of each weight file, how many pieces are looked at and how long they are: two checkpoints that differ in a hundredth of their
bytes are taken for one with a probability below 1 %, those that differ in a tenth with 1e-23."""

_MIXED = "int8, mixed, without constants"
"""What is in pages of 8 bits: heads less what biases add, times a Hadamard matrix (ops/paged_attention/mixing.py), as they once
were not."""


def identity_of(weights: bytes, facts: Sequence[Any], rows: Sequence[Any], state_arrays: Sequence[Any]) -> bytes:
    """16 bytes.

    Args:
        weights: of the checkpoint, see `weights_digest`.
        facts: whatever else decides what is in a page: model configuration, dtypes, quantization, page size, windows.
        rows: of a page, one of each array: (shape, dtype).
        state_arrays: arrays with a row a snapshot.
    """
    h = hashlib.blake2b(weights, digest_size=16)
    shapes = [(tuple(shape), _MIXED if str(dtype) == "int8" else str(dtype)) for shape, dtype in rows]
    shapes += [(tuple(a.shape[1:]), str(a.dtype)) for a in state_arrays]
    h.update(repr((list(map(str, facts)), len(rows), shapes)).encode())
    return h.digest()


def weights_digest(path: pathlib.Path) -> bytes:
    """Of a checkpoint's files: names, sizes and evenly spread pieces of each."""
    h = hashlib.blake2b(digest_size=16)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and _has_weights(p))
    for file in files:
        size = file.stat().st_size
        h.update(f"{file.name if path.is_dir() else ''}:{size};".encode())
        with file.open("rb") as opened:
            step = max(SAMPLE_BYTES, size // SAMPLES)
            for at in range(0, size, step):
                opened.seek(at)
                h.update(opened.read(SAMPLE_BYTES))
    return h.digest()


def _has_weights(path: pathlib.Path) -> bool:
    """Everything but texts about it: a sharded checkpoint's parts have many endings."""
    return path.suffix not in (".md", ".txt", ".py", ".jinja", ".png") and not path.name.startswith(".")
