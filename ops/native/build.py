"""Builds the library of native CPU handlers with whatever C++ compiler is at hand, once for each version of it.

The result lies in the user's cache under a name made of the sources' hash, the compiler and jaxlib's version, so that
a change of any of them builds anew and several versions live side by side. What a stopped build has compiled waits beside it
for the next one. A library in this folder is taken first:
`python -m ops.native.build ops/native` before `pip wheel .` makes a wheel that carries it (and is then for one platform).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import jax
import jaxlib.version

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra")
COMPILERS = ("c++", "g++", "clang++")
_WORK = "building-"
"""Begins the name of the folder of a build that has not ended."""
_TELL_EVERY_S = 15.0


class BuildError(Exception):
    """The library cannot be had; the message is one line saying why and what to do."""


def sources() -> list[Path]:
    """The C++ files, sorted."""
    return sorted(SOURCES.rglob("*.cc"))


@functools.cache
def source_hash() -> str:
    """16 hex digits over sources, flags and the headers' version; part of every handler's registered name."""
    digest = hashlib.sha256(" ".join((*FLAGS, jaxlib.version.__version__)).encode())
    for path in sorted([*SOURCES.rglob("*.cc"), *SOURCES.rglob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def handlers() -> list[str]:
    """The names of the handlers that the sources define."""
    return [name for path in sources() for name in re.findall(r"^JAXSERVE_HANDLER\((\w+)", path.read_text(), re.M)]


def find_compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, the system's, or the one in the PyPI package `ziglang`.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("CXX")
    for name in (named.split() if named else None, *([c] for c in COMPILERS)):
        if name and shutil.which(name[0]):
            return name
    if importlib.util.find_spec("ziglang") is not None:
        # zig takes -march from the machine unless told; handlers choose instructions at run time. It writes debug information
        # unless told, too.
        baseline = ["-mcpu=baseline"] if platform.machine() in ("x86_64", "AMD64") else []
        return [sys.executable, "-m", "ziglang", "c++", "-g0", *baseline]
    raise BuildError(
        "native CPU kernels need a C++ compiler once, and none was found: "
        "install g++ or clang++, or run `pip install ziglang`"
    )


def prebuilt() -> Path | None:
    """The library that came with the package, if it was built from these very sources."""
    path = SOURCES / _carried_name()
    return path if path.exists() else None


def _carried_name() -> str:
    return f"libjaxserve-{source_hash()}{_suffix()}"


def build(folder: Path | None = None) -> Path:
    """The library's path, building it when it is not there yet. Safe to call from several processes.

    Args:
        folder: where to put it, under the name that a package carries; when None the user's cache folder, or that of
            JAXSERVE_CACHE in the environment, under a name with the compiler in it.
    Raises:
        BuildError: no compiler, or it failed.
    """
    if folder is None and (found := prebuilt()) is not None:
        return found
    compiler = find_compiler()
    if folder is None:
        import platformdirs  # ops needs jax alone wherever nothing is built

        folder = Path(os.environ.get("JAXSERVE_CACHE") or platformdirs.user_cache_dir("jaxserve")) / "native"
        target = folder / f"libjaxserve-{source_hash()}-{_compiler_hash(tuple(compiler))}{_suffix()}"
    else:
        target = folder / _carried_name()
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock"):
            if not target.exists():
                _compile(compiler, target)
    except OSError as error:
        raise BuildError(
            f"native CPU kernels could not be built in {folder} ({error.strerror or error}): name a folder that can be written "
            "with JAXSERVE_CACHE in the environment"
        ) from error
    return target


def _compile(compiler: list[str], target: Path) -> None:
    """Compiles and links, under the folder's lock. Objects are kept until the library is there: who is stopped goes on."""
    work = target.parent / f"{_WORK}{target.stem}"
    for left in target.parent.glob(f"{_WORK}*"):
        if left != work:  # of a version that was never finished
            shutil.rmtree(left, ignore_errors=True)
    work.mkdir(exist_ok=True)
    flags = [*FLAGS, "-isystem", jax.ffi.include_dir(), f"-I{SOURCES}"]
    objects = {path: work / f"{path.stem}.o" for path in sources()}
    missing = [path for path, obj in objects.items() if not obj.exists()]
    progress = _Progress(len(objects) + 1, len(objects) - len(missing), "zig" if "ziglang" in compiler else compiler[0])
    with ThreadPoolExecutor(_cores()) as pool:
        jobs = [pool.submit(_run, [*compiler, *flags, "-c", str(path)], objects[path], work) for path in missing]
        try:
            for job in as_completed(jobs):
                job.result()
                progress.one()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    _run([*compiler, "-shared", *map(str, objects.values()), *_link_flags()], target, work)
    shutil.rmtree(work, ignore_errors=True)


class _Progress:
    """Says on stderr what a build that takes longer is about, and how much longer."""

    def __init__(self, total: int, done: int, compiler: str) -> None:
        self._total, self._done, self._begin = total, done, done
        self._began = self._told = time.monotonic()
        go_on = f", {done} of them compiled before" if done else ""
        self._say(
            f"building the native CPU kernels with {Path(compiler).name}, once for this machine: {total - 1} files{go_on}"
        )

    def one(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._told < _TELL_EVERY_S:
            return
        self._told = now
        left = (now - self._began) / (self._done - self._begin) * (self._total - self._done)
        words = f"{left:.0f} seconds" if left < 100 else f"{left / 60:.0f} minutes"
        self._say(f"native CPU kernels: {self._done} of {self._total - 1} files, about {words} more")

    @staticmethod
    def _say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _link_flags() -> list[str]:
    return ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-pthread"]


def _run(command: list[str], result: Path, work: Path) -> None:
    """Has a compiler make a file, which is there whole or not at all."""
    # zig keeps what it makes of its own library, and all that it compiled, in the home folder, which may be read-only, and in
    # that of the moment: both where a stopped build finds them again.
    caches = {name: str(work / "zig") for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")}
    part = work / f"{result.name}.part"
    done = subprocess.run(
        [*command, "-o", str(part)], capture_output=True, text=True, check=False, env={**caches, **os.environ}
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error:" in line] or done.stderr.splitlines()[-1:]
        reason = lines[0] if lines else f"exit code {done.returncode}"
        raise BuildError(f"native CPU kernels did not compile with `{command[0]}`: {reason}")
    os.replace(part, result)


@functools.cache
def _compiler_hash(compiler: tuple[str, ...]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return hashlib.sha256("\n".join((*compiler, version)).encode()).hexdigest()[:8]


def _suffix() -> str:
    return sysconfig.get_config_var("SHLIB_SUFFIX") or ".so"


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    """Holds an exclusive lock on a file, so that one process builds and the others find what it built."""
    with path.open("w") as handle:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        except ImportError:  # no flock on this system: two processes may both build, and the last one's file stays
            pass
        yield


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
