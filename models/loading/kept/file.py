"""One file of kept weights: arrays as they lie in memory, and behind them what they are.

    64 bytes   magic, where the description begins, its length, and the first 32 bytes of its SHA-256 in hex
    arrays     each at a multiple of ALIGNMENT bytes, zeros between them
    JSON       the description: key, and for each parameter its type, what its type says of it, and its arrays

The head is written last, and the file gets its name when all of it is there; so a torn file is never taken for a whole one. Each
array has a checksum, which costs nothing: it reads the memory that the first step would read from the disk. A file that is not as
it was written is reported as such, whatever is wrong with it. Nothing in it is code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from models.loading.kept import ahead
from ops import buffers
from ops.buffers import ALIGNMENT
from ops.linear import StoredWeight
from ops.linear.weights.plain import from_plain, to_plain

SMAPS = Path("/proc/self/smaps")
LEAST_COPIED = 64 << 20  # bytes of a file below which caches hold much of it
LOOKED_AT = 16 << 20  # bytes of a mapping by which it is judged
READ_AT_ONCE = 16 << 20  # bytes
HUGE_SHARE = 0.9  # of a mapping: with less in huge pages it is worth a copy
MAGIC = b"jaxserve weights"
HEAD = 64

Parameter = np.ndarray | StoredWeight
"""A parameter's arrays on the host: dense, or a stored weight of numpy arrays."""


class DamagedError(Exception):
    """The file is not as it was written; the message says in which way."""


@dataclasses.dataclass(frozen=True)
class _Array:
    dtype: str
    shape: tuple[int, ...]
    offset: int
    total: int  # see `_total`

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def write(path: Path, key: str, parameters: Mapping[str, Any]) -> None:
    """Writes parameters, whose arrays numpy can see, and lets the file appear under its name when it is whole.

    Raises:
        OSError: no room, or no right to; nothing is left behind then.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".part", delete=False) as file:
        try:
            file.write(bytes(HEAD))
            described: dict[str, Any] = {}
            for name, value in parameters.items():
                kind, arrays, meta = to_plain(value)
                described[name] = {
                    "kind": kind,
                    "meta": meta,
                    "arrays": {part: _append(file, np.asarray(array)) for part, array in arrays.items()},
                }
            offset = file.tell()
            text = json.dumps({"key": key, "parameters": described}).encode()
            file.write(text)
            file.seek(0)
            file.write(_head(offset, text))
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _head(offset: int, text: bytes) -> bytes:
    numbers = offset.to_bytes(8, "little") + len(text).to_bytes(8, "little")
    return MAGIC + numbers + hashlib.sha256(text).hexdigest()[:32].encode()


def _append(file: Any, array: np.ndarray) -> list[Any]:
    """Writes an array at the next multiple of ALIGNMENT, zeros up to the next one behind it; its entry of the description."""
    array = np.ascontiguousarray(array)
    offset = file.tell()
    data = array.reshape(-1).view(np.uint8)
    file.write(data.data)
    file.write(bytes(-data.size % ALIGNMENT))
    whole = data.size // 8 * 8
    total = _total(data[:whole]) + int.from_bytes(data[whole:].tobytes(), "little")
    return [array.dtype.name, list(array.shape), offset, total % (1 << 64)]


def _total(data: np.ndarray) -> int:
    """The sum of bytes taken as 64-bit numbers, modulo 2^64; of a whole number of them."""
    return int(np.add.reduce(data.view(np.uint64)))


def read(path: Path, key: str) -> dict[str, Parameter]:
    """The parameters, of arrays that are the file's memory: private to this process where it writes to them, which nobody does.
    Where the system maps the file in small pages and has huge ones, they are a copy in those, which steps read twice as fast.

    Raises:
        DamagedError: the file is not what was written, or has another key.
        OSError: there is none, or it cannot be read.
    """
    data = ahead.take(path)
    data = memory_of(path) if data is None else data
    size = data.size
    offset, length = (int.from_bytes(data[at : at + 8].tobytes(), "little") for at in (16, 24))
    text = data[offset : offset + length].tobytes()
    if offset + length != size or data[:HEAD].tobytes() != _head(offset, text):
        raise DamagedError("its description is not the one that was written")
    described = json.loads(text)
    if described["key"] != key:
        raise DamagedError("it holds other weights")
    checks: list[tuple[str, _Array]] = []
    views: dict[str, dict[str, np.ndarray]] = {}
    for name, entry in described["parameters"].items():
        arrays = views[name] = {}
        for part, (dtype, shape, begin, total) in entry["arrays"].items():
            array = _Array(dtype, tuple(shape), begin, total)
            if begin % ALIGNMENT or not HEAD <= begin <= begin + array.num_bytes <= offset:
                raise DamagedError(f"{name} lies outside of it")
            checks.append((name, array))
            arrays[part] = data[begin : begin + array.num_bytes].view(jnp.dtype(dtype)).reshape(array.shape)
    _check(data, checks)
    return {
        name: from_plain(entry["kind"], views[name], entry["meta"]) for name, entry in described["parameters"].items()
    }


def memory_of(path: Path) -> np.ndarray:
    """A file's bytes: mapped, or in huge pages of this process where that is worth it.

    Raises:
        DamagedError: it is too short for anything.
        OSError: there is none, or it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < HEAD:
            raise DamagedError("it is too short")
        # Copied where written to: jax takes only writable memory over, and nobody writes.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for advice in ("MADV_HUGEPAGE", "MADV_WILLNEED"):
            if hasattr(mmap, advice):
                with contextlib.suppress(OSError):
                    mapped.madvise(getattr(mmap, advice))
        data = np.frombuffer(mapped, np.uint8)
        if size >= LEAST_COPIED and buffers.huge_pages():
            _total(data[: min(size, LOOKED_AT) // 8 * 8])
            if _in_small_pages(data):
                data = _copied(file.fileno(), size)
    return data


def _in_small_pages(data: np.ndarray) -> bool:
    """Whether much of what has been read of a mapping is not in huge pages; False where the system does not say."""
    begin, wanted = f"{data.ctypes.data:x}-", {"Rss:": 0, "FilePmdMapped:": 0, "AnonHugePages:": 0}
    try:
        lines = SMAPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    first = next((i for i, line in enumerate(lines) if line.startswith(begin)), len(lines))
    for line in lines[first + 1 :]:
        name, *rest = line.split()
        if not name.endswith(":"):
            break  # the next mapping
        if name in wanted:
            wanted[name] = int(rest[0])
    return wanted["FilePmdMapped:"] + wanted["AnonHugePages:"] < HUGE_SHARE * wanted["Rss:"]


def _copied(file: int, size: int) -> np.ndarray:
    """The file's bytes, in huge pages: read there, not copied from a mapping, which costs a fault for each of its pages."""
    data = buffers.lasting.empty((size,), np.uint8)
    room = data.data

    def fill(first: int) -> None:
        last = min(first + READ_AT_ONCE, size)
        while first < last:
            count = os.preadv(file, [room[first:last]], first)
            if count == 0:
                raise DamagedError("it is too short")
            first += count

    with ThreadPoolExecutor(2, thread_name_prefix="weights") as pool:
        list(pool.map(fill, range(0, size, READ_AT_ONCE)))
    return data


def _check(data: np.ndarray, arrays: list[tuple[str, _Array]]) -> None:
    def is_whole(item: tuple[str, _Array]) -> bool:
        array = item[1]
        end = array.offset + -(-array.num_bytes // 8) * 8  # zeros behind it, up to ALIGNMENT
        return _total(data[array.offset : end]) == array.total

    check: Callable[[tuple[str, _Array]], bool] = is_whole
    with ThreadPoolExecutor(2, thread_name_prefix="weights") as pool:
        for (name, _), whole in zip(arrays, pool.map(check, arrays), strict=True):
            if not whole:
                raise DamagedError(f"{name} has other values than were written")
