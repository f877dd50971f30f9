"""Native CPU kernels: C++ handlers that XLA calls inside its programs (`jax.ffi`), sharing XLA's thread pool.

An op asks `available()` and, where it is False, runs its plain-XLA body. Nothing is built or loaded before the first
question. `JAXSERVE_NATIVE=0` turns the kernels off; `JAXSERVE_NATIVE_ISA` takes less than the CPU has (generic, avx2,
avx512, vnni, bf16), for tests and for finding faults.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Generator
from typing import Any

import jax
import numpy as np

from ops.native import build

ISA_LEVELS = ("generic", "avx2", "avx512", "vnni", "bf16")


def available() -> bool:
    """Whether the kernels can be called; builds (seconds, once a machine) and loads the library when first asked."""
    return _load()[0] is not None


def loaded() -> bool:
    """Whether the kernels are there already, because somebody has asked `available`."""
    return _load.cache_info().currsize > 0 and _load()[0] is not None


def library() -> ctypes.CDLL:
    """The library, for functions that are no XLA handlers.

    Raises:
        ValueError: it is not there.
    """
    found, reason = _load()
    if found is None:
        raise ValueError(reason)
    return found


def status() -> str:
    """One line: the instruction set in use, or what is missing and how to get it."""
    library, reason = _load()
    return reason if library is None else f"native CPU kernels ready ({isa()})"


def isa() -> str:
    """The instruction-set level in use, one of `ISA_LEVELS`."""
    return ISA_LEVELS[_level]


def set_isa(name: str | None) -> str:
    """Takes at most the named level, or all the CPU has for None; returns the level now in use.

    Raises:
        ValueError: no level is called so.
    """
    global _level
    library, reason = _load()
    if library is None:
        raise ValueError(f"No instruction set can be chosen: {reason}.")
    _level = library.jaxserve_set_isa(_level_number(name))
    return isa()


@contextlib.contextmanager
def rehearsal(on: bool = True) -> Generator[None]:
    """Inside, products compute a little of each phase on every thread and give zeros: what a program's first run costs, without
    what its products do. Nothing changes where there are no kernels.

    Args:
        on: False for a stretch of a rehearsal that counts.
    """
    global _rehearsing
    before, _rehearsing = _rehearsing, on
    _tell(on)
    try:
        yield
    finally:
        _rehearsing = before
        _tell(before)


def _tell(rehearsing: bool) -> None:
    if available():
        library().jaxserve_rehearse(int(rehearsing))


_rehearsing = False


def target(name: str) -> str:
    """The name under which handler `name` is registered with XLA, for `jax.ffi.ffi_call`.

    It carries the sources' hash: a program in the persistent compilation cache never meets a handler with other
    operands than those it was compiled for.
    """
    return f"jaxserve.{name}.{build.source_hash()}"


def zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros on the CPU, where the kernels are there: a large array takes memory when it is written to, not before."""
    return _zeros(shape, np.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    return jax.ffi.ffi_call(target("jaxserve_zeros"), jax.ShapeDtypeStruct(shape, dtype))()


_level = 0


def _level_number(name: str | None) -> int:
    if name is None:
        return -1
    if name not in ISA_LEVELS:
        raise ValueError(f"Instruction set {name!r} is not known; known ones are {', '.join(ISA_LEVELS)}.")
    return ISA_LEVELS.index(name)


@functools.cache
def _load() -> tuple[Any, str]:
    """(library, "") or (None, why not)."""
    global _level
    if os.environ.get("JAXSERVE_NATIVE", "1") == "0":
        return None, "native CPU kernels are turned off by JAXSERVE_NATIVE=0"
    try:
        library = ctypes.CDLL(str(build.build()))
    except build.BuildError as error:
        return None, str(error)
    except OSError as error:
        return None, f"native CPU kernels could not be loaded: {error}"
    _level = library.jaxserve_set_isa(_level_number(os.environ.get("JAXSERVE_NATIVE_ISA") or None))
    for name in build.handlers():
        jax.ffi.register_ffi_target(target(name), jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return library, ""
