"""jaxserve doctor: what this machine has, what a server would make of it, and what to do where something is missing."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_int8", "avx_vnni")
LITTLE_MEMORY, LITTLE_DISK = 4 * 2**30, 2 * 2**30


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        state: "ok", "note" (works, could be better) or "bad" (a server would not start, or not serve).
        remedy: what to do.
    """

    what: str
    state: Literal["ok", "note", "bad"]
    text: str
    remedy: str = ""


def python() -> Iterator[Finding]:
    """The interpreter and the packages."""
    from serving.installation import version

    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}; jaxserve {version()}")
    names = ("jax", "flax", "tokenizers", "grpcio", "fastapi", "llguidance")
    yield Finding("packages", "ok", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))


def processor() -> Iterator[Finding]:
    """Cores, and the instructions that the kernels use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total = os.cpu_count() or usable
    less = f" of {total}: the others are not this process's to use" if usable < total else ""
    yield Finding("cores", "ok", f"{usable}{less}")
    info = pathlib.Path("/proc/cpuinfo")
    flags = set(info.read_text(encoding="utf-8").split()) if info.is_file() else set()
    found = [name for name in INSTRUCTIONS if name in flags]
    if platform.machine() in ("x86_64", "AMD64") and flags and "avx2" not in flags:
        yield Finding("instructions", "note", "no AVX2", "the native kernels need it; plain XLA serves, more slowly.")
    else:
        yield Finding("instructions", "ok", ", ".join(found) or platform.machine())


def memory() -> Iterator[Finding]:
    """What is free, within the container's bound."""
    from serving.memory import free_memory

    free, total = free_memory()
    text = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if free < LITTLE_MEMORY:
        yield Finding("memory", "note", text, "serve a small model, and say --kv-cache-memory for its pages.")
    else:
        yield Finding("memory", "ok", text)


def kernels() -> Iterator[Finding]:
    """The native kernels, or a compiler to build them with."""
    from ops.native import build

    if build.prebuilt() is not None:
        yield Finding("native kernels", "ok", "built in")
        return
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        yield Finding("compiler", "note", "none", f"{error}.")
        return
    yield Finding("compiler", "ok", f"{' '.join(map(str, compiler))}: the native kernels are built at the first start")


def devices() -> Iterator[Finding]:
    """What jax computes on."""
    import jax

    try:
        found = jax.devices()
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        yield Finding("devices", "bad", f"jax finds none: {first}", "JAX_PLATFORMS=cpu serves from the processor.")
        return
    kinds = {f"{device.platform} {device.device_kind}" for device in found}
    yield Finding("devices", "ok", f"{len(found)}: {', '.join(sorted(kinds))}")
    if found[0].platform == "cpu" and shutil.which("nvidia-smi"):
        from serving.installation import extra

        yield Finding("gpu", "note", "there is one, and jax does not see it", f"{extra('cuda')}.")


def ports() -> Iterator[Finding]:
    """Whether the default ports are free."""
    from serving.boot.flags.launch import GRPC_PORT, HTTP_PORT

    for name, port, flag in (("HTTP", HTTP_PORT, "--port"), ("gRPC", GRPC_PORT, "--grpc-port")):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                yield Finding(f"{name} port", "note", f"{port} is taken", f"say {flag} N, or end what listens there.")
            else:
                yield Finding(f"{name} port", "ok", f"{port} is free")


def caches() -> Iterator[Finding]:
    """Where programs and models are kept."""
    from serving.installation import cache_folder

    folder = cache_folder()
    existing = next(
        path for path in (folder, *folder.parents) if os.path.exists(path)
    )  # not where it may not look, either
    if not os.access(existing, os.W_OK):
        yield Finding(
            "cache", "bad", f"{folder} cannot be written", "say JAXSERVE_CACHE=DIR: every start would compile anew."
        )
        return
    free = shutil.disk_usage(existing).free
    size = sum(map(_num_bytes, folder.rglob("*"))) if existing == folder else 0
    text = f"{folder}: {size / 2**20:.0f} MiB; {free / 2**30:.1f} GiB free there"
    if free < LITTLE_DISK:
        yield Finding("cache", "note", text, "make room: `jaxserve list` and `jaxserve rm NAME`.")
    else:
        yield Finding("cache", "ok", text)


def _num_bytes(path: pathlib.Path) -> int:
    try:
        found = path.lstat()
    except OSError:  # others write there, and throw away
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    python, processor, memory, kernels, devices, ports, caches,
)  # fmt: skip


def look() -> list[Finding]:
    """All findings. A check that fails is one itself."""
    found: list[Finding] = []
    for check in CHECKS:
        try:
            found += check()
        except Exception as error:
            found.append(Finding(check.__name__, "bad", f"could not be looked at: {error}", "mend this first."))
    return found


def main(argv: Sequence[str], word: str = "doctor") -> int:
    """Prints what was found. Returns 1 when a server would not start."""
    parser = argparse.ArgumentParser(prog="jaxserve doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="JSON lines")
    args = parser.parse_args(argv)
    found = look()
    marks = {"ok": "ok  ", "note": "note", "bad": "BAD "}
    colours = {"ok": "32", "note": "33", "bad": "31"}
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for one in found:
        if args.json:
            print(json.dumps(dataclasses.asdict(one)))
            continue
        mark = f"\x1b[{colours[one.state]}m{marks[one.state]}\x1b[0m" if coloured else marks[one.state]
        print(f"{mark} {one.what}: {one.text}" + (f"\n       -> {one.remedy}" if one.remedy else ""))
    return int(any(one.state == "bad" for one in found))
