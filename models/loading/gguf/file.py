"""GGUF files (the format of llama.cpp and ggml): metadata and tensors in one file, weights usually quantized in blocks.

The header is parsed here rather than by `gguf.GGUFReader`, which takes 2 to 10 s for one (it makes several arrays for
each of some 10^5 tokens; this takes 0.1 to 0.5 s), and every offset is checked against the file's size.
Block formats are decoded by `gguf.quants`. Models split over several files (`-00001-of-00003.gguf`, llama.cpp's gguf-split)
are read as one.
"""

from __future__ import annotations

import dataclasses
import math
import re
import struct
import threading
import weakref
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from models.loading.files.mapped import MappedFile
from ops import buffers

_SCALARS = {
    0: np.dtype("<u1"), 1: np.dtype("<i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("?"), 10: np.dtype("<u8"), 11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_PLAIN = {
    gguf.GGMLQuantizationType.F32: np.dtype("<f4"),
    gguf.GGMLQuantizationType.F16: np.dtype("<f2"),
    gguf.GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
    gguf.GGMLQuantizationType.F64: np.dtype("<f8"),
}
DECODED = frozenset(kind for kind in gguf.GGMLQuantizationType if hasattr(gguf.quants, kind.name))
"""Block types that `gguf.quants` decodes: each is a class of its own there."""
_RUN_BYTES = 1 << 20  # blocks decoded at once: their float32 temporaries stay in cache


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is: numpy's shape (slowest axis first), block type, offset in bytes from its file's start, and which of
    a split model's files."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int
    part: int = 0


_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


_BESIDE = re.compile(r"(?:^|[-._])(?:mmproj|imatrix)(?:$|[-._])", re.IGNORECASE)


def is_beside_a_model(name: str) -> bool:
    """Whether a GGUF file of such a name holds no language model but what goes with one: what sees for it, or statistics of it."""
    return _BESIDE.search(Path(name).name.removesuffix(".gguf")) is not None


def split_paths(path: Path) -> list[Path]:
    """All files of the split that `path` is named as a part of, in order; only itself where it is not named so."""
    match = _PART.search(path.name)
    if match is None:
        return [path]
    base, count = path.name[: match.start()], int(match[2])
    return [path.with_name(f"{base}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


_lock = threading.Lock()
_opened: weakref.WeakValueDictionary[tuple[Path, int, int], GGUFFile] = weakref.WeakValueDictionary()


def open_gguf(path: Path) -> GGUFFile:
    """A file, or the one that somebody has open, which nobody changes: a start reads headers for the weights and, in another
    thread, for the tokenizer, and 150,000 tokens take 0.2 s.

    Raises:
        ValueError: as `GGUFFile`.
        OSError: it cannot be read.
    """
    found = path.stat()
    key = (path, found.st_size, found.st_mtime_ns)
    with _lock:
        file = _opened.get(key)
        if file is None:
            file = _opened[key] = GGUFFile(path)
        return file


class GGUFFile:
    """Metadata and tensors of one model, in one file or split over several.

    Args:
        path: the file, or any of the files that a model is split over.

    Attributes:
        metadata: scalars, strings, lists of strings, or numpy arrays, by key.
        tensors: by GGUF's name.
    Raises:
        ValueError: not a GGUF file, damaged, truncated, or a part of a split is missing.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._data: list[MappedFile] = []
        parts = split_paths(path)
        self._open(parts[0] if parts[0].exists() else path)
        count = int(self.metadata.get("split.count", 1))
        if count <= 1:
            return
        if len(parts) != count:
            raise ValueError(
                f"{path} is one of {count} files, but is not named like one of them (...-00001-of-{count:05d}.gguf)."
            )
        missing = [part.name for part in parts if not part.exists()]
        if missing:
            raise ValueError(f"{path} is one of {count} files; {missing[0]} is not there: the download is incomplete.")
        for part in parts[1:]:
            self._open(part)
        wanted = self.metadata.get("split.tensors.count", len(self.tensors))
        if len(self.tensors) != wanted:
            raise ValueError(
                f"{path}: its {count} files hold {len(self.tensors)} tensors, not the {wanted} they claim."
            )

    def _open(self, path: Path) -> None:
        self.path, self._size = path, path.stat().st_size
        try:
            self._data.append(MappedFile(path))
            self._parse(memoryview(self._data[-1].bytes))  # pyright: ignore[reportArgumentType]
        except (struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
            raise ValueError(f"{path} is a damaged or truncated GGUF file: {error}.") from None

    def _parse(self, data: memoryview) -> None:
        if bytes(data[:4]) != b"GGUF":
            raise ValueError(f"{self.path} is not a GGUF file: it does not start with 'GGUF'.")
        version, num_tensors, num_keys = struct.unpack_from("<IQQ", data, 4)
        if version not in (2, 3):
            raise ValueError(f"{self.path} is GGUF version {version}; versions 2 and 3 are supported.")
        position, metadata = 24, {}
        for _ in range(num_keys):
            key, position = self._string(data, position)
            (kind,) = struct.unpack_from("<I", data, position)
            metadata[key], position = self._value(data, position + 4, kind, key)
        self.metadata = metadata | self.metadata  # the first file's is the model's
        placed: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(num_tensors):
            name, position = self._string(data, position)
            (num_dims,) = struct.unpack_from("<I", data, position)
            if num_dims > 8:
                raise ValueError(f"{self.path}: tensor {name!r} claims {num_dims} dimensions: the file is damaged.")
            shape = struct.unpack_from(f"<{num_dims}Q", data, position + 4)
            kind, offset = struct.unpack_from("<IQ", data, position + 4 + 8 * num_dims)
            position += 16 + 8 * num_dims
            placed.append((name, shape[::-1], kind, offset))
        alignment = int(metadata.get("general.alignment", 32)) or 32
        start = -(-position // alignment) * alignment
        for name, shape, kind, offset in placed:
            if name in self.tensors:
                raise ValueError(f"{self.path}: the tensor {name!r} is in another of the model's files too.")
            self.tensors[name] = self._tensor(name, shape, kind, start + offset)

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        try:
            block_type = gguf.GGMLQuantizationType(kind)
            block, block_bytes = gguf.GGML_QUANT_SIZES[block_type]
        except (ValueError, KeyError):
            raise ValueError(f"{self.path}: tensor {name!r} has the unknown block type {kind}.") from None
        if block_type not in _PLAIN and block_type not in DECODED:
            raise ValueError(
                f"{self.path}: tensor {name!r} has the block type {block_type.name}, which cannot be decoded."
            )
        elements = math.prod(shape)
        if elements % block or (shape and shape[-1] % block):
            raise ValueError(f"{self.path}: tensor {name!r} {list(shape)} does not fill blocks of {block}.")
        num_bytes = elements // block * block_bytes
        if offset + num_bytes > self._size:
            raise ValueError(
                f"{self.path} is truncated: tensor {name!r} ends at byte {offset + num_bytes}, the file has {self._size}."
            )
        return TensorInfo(shape, block_type, offset, num_bytes, len(self._data) - 1)

    def _string(self, data: memoryview, position: int) -> tuple[str, int]:
        (text,), position = self._strings(data, position, 1)
        return text, position

    def _strings(self, data: memoryview, position: int, count: int) -> tuple[list[str], int]:
        """Strings that follow each other. A vocabulary and its merges are 300,000, and no other Python runs meanwhile."""
        texts, unpack, size = [], _LENGTH.unpack_from, self._size
        for _ in range(count):
            (length,) = unpack(data, position)
            position += 8
            end = position + length
            if end > size:
                raise ValueError(f"{self.path} is truncated: a string of {length} bytes at byte {position} of {size}.")
            # Vocabularies hold tokens that are not whole UTF-8 sequences; surrogates keep their bytes.
            texts.append(str(data[position:end], "utf-8", "surrogateescape"))
            position = end
        return texts, position

    def _value(self, data: memoryview, position: int, kind: int, key: str) -> tuple[Any, int]:
        if kind == _STRING:
            return self._string(data, position)
        if kind == _ARRAY:
            item, count = struct.unpack_from("<IQ", data, position)
            position += 12
            if item == _STRING:
                return self._strings(data, position, count)
            if item in _SCALARS:
                num_bytes = count * _SCALARS[item].itemsize
                if num_bytes > self._size - position:
                    raise ValueError(f"{self.path} is truncated in the metadata array {key!r}.")
                return np.frombuffer(data, _SCALARS[item], count, position), position + num_bytes
        if kind in _SCALARS:
            value = np.frombuffer(data, _SCALARS[kind], 1, position) if position < self._size else None
            if value is None:
                raise ValueError(f"{self.path} is truncated in the metadata of {key!r}.")
            return value[0].item(), position + _SCALARS[kind].itemsize
        raise ValueError(f"{self.path}: the metadata {key!r} has the unknown type {kind}.")

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """A tensor's values; `index` reads one entry of the first axis. Quantized blocks come out as float32."""
        info = self.tensors[name]
        shape, start, num_bytes = info.shape, info.offset, info.num_bytes
        if index is not None:
            if not shape or index >= shape[0]:
                raise ValueError(f"{self.path}: the tensor {name!r} {list(shape)} has no matrix {index}.")
            num_bytes //= shape[0]
            start, shape = start + index * num_bytes, shape[1:]
        raw = self._data[info.part].bytes[start : start + num_bytes]
        if info.kind in _PLAIN:
            return raw.view(_PLAIN[info.kind]).reshape(shape)
        block, block_bytes = gguf.GGML_QUANT_SIZES[info.kind]
        run = max(1, _RUN_BYTES // (4 * block)) * block_bytes
        out = buffers.empty((math.prod(shape),), np.float32)
        for first in range(0, num_bytes, run):
            blocks = raw[first : first + run].reshape(1, -1)
            begin = first // block_bytes * block
            values = gguf.quants.dequantize(blocks, info.kind).reshape(-1)
            out[begin : begin + values.size] = values
        return out.reshape(shape)

    def raw(self, name: str) -> np.ndarray:
        """A tensor's bytes as the file has them, read-only."""
        info = self.tensors[name]
        return self._data[info.part].bytes[info.offset : info.offset + info.num_bytes]

    def release(self, name: str) -> None:
        """Lets go of a tensor's part of the file."""
        info = self.tensors[name]
        self._data[info.part].release(info.offset, info.num_bytes)
