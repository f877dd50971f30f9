"""Hugging Face directories: `config.json` beside one or several safetensors files.

The format (huggingface.co/docs/safetensors): 8 bytes of header length, a JSON header, then raw little-endian data. It is
read here directly, mapped into memory, so that every number of the header is checked against the file before use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from models.loading.files import consolidated
from models.loading.files.canonical import canonical_name
from models.loading.files.mapped import MappedFile

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class SafetensorsFile:
    """One file: tensors by name, as views into the mapped file.

    Raises:
        ValueError: the header does not describe the file.
    """

    def __init__(self, path: Path):
        self.path = path
        size = path.stat().st_size
        if size < 8:
            raise ValueError(f"{path} has {size} bytes: it is not a safetensors file.")
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(
                    f"{path}: its header claims {header_bytes} bytes, the file has {size}: it is truncated or not "
                    "a safetensors file."
                )
            try:
                header = json.loads(file.read(header_bytes).decode())  # of bytes, json would guess UTF-16 and UTF-32
            except UnicodeDecodeError:
                raise ValueError(f"{path}: its header is not UTF-8: it is not a safetensors file.") from None
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}: its header is not JSON ({error}): it is not a safetensors file.") from None
        if not isinstance(header, dict):
            raise ValueError(f"{path}: its header is not a JSON object.")
        metadata = header.pop("__metadata__", None)
        self.metadata: dict[str, Any] = metadata if isinstance(metadata, dict) else {}
        self._start = 8 + header_bytes
        self.tensors: dict[str, tuple[Any, tuple[int, ...], int]] = {}
        for name, entry in header.items():
            self.tensors[name] = self._entry(name, entry, size - self._start)
        self._data = MappedFile(path)

    def _entry(self, name: str, entry: Any, data_bytes: int) -> tuple[Any, tuple[int, ...], int]:
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            valid = all(type(n) is int and n >= 0 for n in (*shape, start, end))
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"{self.path}: the header's entry of tensor {name!r} is malformed.") from None
        if not valid:
            raise ValueError(f"{self.path}: the header's entry of tensor {name!r} has numbers that are not sizes.")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{self.path}: tensor {name!r} has the unknown type {dtype!r}.")
        wanted = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        if end - start != wanted or end > data_bytes:
            raise ValueError(
                f"{self.path}: tensor {name!r} ({dtype} {shape}) needs {wanted} bytes; the header places it at bytes "
                f"{start} to {end} of {data_bytes}. The file is damaged or truncated."
            )
        return np.dtype(DTYPES[dtype]), tuple(shape), start

    def read(self, name: str) -> np.ndarray:
        """A read-only view of a tensor."""
        dtype, shape, start = self.tensors[name]
        begin = self._start + start
        return self._data.bytes[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    def release(self, name: str) -> None:
        """Lets go of a tensor's part of the file."""
        dtype, shape, start = self.tensors[name]
        self._data.release(self._start + start, math.prod(shape) * dtype.itemsize)


class SafetensorsCheckpoint:
    """All tensors of a directory: from `model.safetensors.index.json`, or every safetensors file there.

    Args:
        hf: the configuration; needed for Mistral's own layout, whose q and k are arranged by heads.
    Raises:
        ValueError: no weights, or a file that is damaged or missing.
    """

    def __init__(self, directory: Path, hf: Mapping[str, Any] | None = None):
        self._files: dict[str, SafetensorsFile] = {}
        opened = [SafetensorsFile(path) for path in _files(directory)]
        for file in opened:
            for name in file.tensors:
                if name in self._files:
                    raise ValueError(f"{file.path}: the tensor {name!r} is also in {self._files[name].path}.")
                self._files[name] = file
        self._consolidated = (hf or {}) if consolidated.is_consolidated(self._files) else None
        self.metadata = {key: value for file in opened for key, value in file.metadata.items()}
        self._by_canonical = {self.canonical(name): name for name in self._files}

    @property
    def own_names(self) -> Collection[str]:
        return self._files.keys()

    def canonical(self, name: str) -> str:
        """A tensor's name in the plain language model."""
        return canonical_name(name) if self._consolidated is None else consolidated.plain_name(name)

    def locate(self, name: str) -> str | None:
        if name in self._files:
            return name
        # A bare network's names lack what the same network with a head has in front.
        found = self._by_canonical.get(name) or self._by_canonical.get(name.removeprefix("model."))
        if found is None and name == "model.embed_tokens.weight":
            return self._by_canonical.get("lm_head.weight")  # tied, and saved under the other name
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        own = self.locate(name)
        assert own is not None
        return self._files[own].tensors[own][1]

    def dtype(self, name: str) -> np.dtype:
        """How a tensor is stored."""
        own = self.locate(name)
        assert own is not None
        return self._files[own].tensors[own][0]

    def read(self, name: str) -> np.ndarray:
        own = self.locate(name)
        assert own is not None
        array = self._files[own].read(own)
        if self._consolidated is None:
            return array
        return consolidated.half_split(self.canonical(own), array, self._consolidated)

    def release(self, name: str) -> None:
        own = self.locate(name)
        if own is not None:
            self._files[own].release(own)


NOT_THE_MODEL = ("adapter_", "optimizer", "training_", "consolidated", "mmproj", "tokenizer")
"""How other files of a directory begin, that are safetensors too."""


def _files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        index = directory / "consolidated.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.exists() and not (index.name.startswith("consolidated") and single.exists()):
        return _indexed(directory, index)
    if single.exists():
        return [single]
    found = sorted(directory.glob("*.safetensors"))
    paths = [path for path in found if not path.name.startswith(NOT_THE_MODEL)]
    paths = paths or [path for path in found if path.name.startswith("consolidated")]
    if not paths:
        other = [path.name for path in directory.glob("*.bin")]
        hint = f" {other[0]} is a pickle: convert it to safetensors." if other else ""
        raise ValueError(f"{directory} has no *.safetensors file.{hint}")
    return paths


def _indexed(directory: Path, index: Path) -> list[Path]:
    """The files that an index names, in the directory or below it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{index} is not a safetensors index: it has no weight_map.") from None
    for name in names:
        below = Path(name)
        if below.is_absolute() or ".." in below.parts:
            raise ValueError(f"{index} names {name}, which is not in {directory}.")
        if not (directory / below).exists():
            raise ValueError(f"{index} names {name}, which is not in {directory}: the download is incomplete.")
    return [directory / name for name in names]
