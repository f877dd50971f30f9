"""Compiling every program at start, in parallel, from a cache where possible; and noticing any compilation after that."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import logging
import os
import pathlib
import pickle
import tempfile
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
from jax.experimental import serialize_executable

from ops import native
from ops.sources import digest
from serving.engine.device.programs.keys import ProgramKey

log = logging.getLogger(__name__)

MOST_AT_ONCE = 16
"""Programs that are compiled at once, at most."""
_SOURCES = ("models", "ops", "sharding", "serving/engine")


@dataclasses.dataclass(frozen=True)
class Program:
    """One function to compile.

    Attributes:
        key: unique among an engine's programs.
        fn: a pure function of arrays.
        args: arrays or ShapeDtypeStructs; of one replica, where the mesh has several (see placement.py).
        donate: positions of arguments whose buffers the result may take over.
        shared: positions of arguments that are the same for every replica, in a program that each replica runs. None: it
            is of the whole mesh.
        resident: the results stay on the devices, each with its replica.
    """

    key: ProgramKey
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    donate: tuple[int, ...] = ()
    shared: tuple[int, ...] | None = None
    resident: bool = False

    @property
    def name(self) -> str:
        """For progress, errors and the file of its executable."""
        return str(self.key)


_starting = 0
"""How many engines of this process are starting: their compilations are no defect of another one's."""


@contextlib.contextmanager
def starting() -> Generator[None]:
    """Marks the time in which compilations are meant to happen."""
    global _starting
    _starting += 1
    try:
        yield
    finally:
        _starting -= 1


_lock = threading.Lock()
_serving = 0
"""How many engines of this process may be asked for something."""


@contextlib.contextmanager
def rehearsing(own: int = 0) -> Generator[None]:
    """A rehearsal of the native kernels, in which products give zeros: only where no other engine of this process serves, whose
    products they were, and none begins to before it ends.

    Args:
        own: 1 for an engine that may be asked for something already, and is not.
    """
    with _lock, native.rehearsal(_serving <= own):
        yield


class CompileGuard:
    """Counts XLA compilations of this process between `arm` and `close`: each is a defect, counted and logged.

    `check` raises if there were any: tests call it.
    """

    _EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self.count = 0
        self.armed = False
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def arm(self) -> None:
        self._set(True)

    def close(self) -> None:
        self._set(False)
        with contextlib.suppress(AssertionError, ValueError):  # closed before
            jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _set(self, armed: bool) -> None:
        global _serving
        with _lock:
            _serving += armed - self.armed
            self.armed = armed

    def check(self) -> None:
        """Raises RuntimeError if anything was compiled since `arm`."""
        if self.count:
            raise RuntimeError(
                f"{self.count} program(s) were compiled after start-up: a shape is missing in the buckets."
            )

    def _on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if self.armed and not _starting and event == self._EVENT:
            self.count += 1
            log.warning("a program was compiled after start-up (%.2f s)", duration_secs)


def source_digest() -> str:
    """Digest of the code that programs are made from: a change there must miss the cache."""
    return digest(*_SOURCES)


@dataclasses.dataclass(frozen=True)
class DeviceSet:
    """The devices that programs are for."""

    platform: str
    kind: str
    number: int


class ProgramCache:
    """Serialized executables in a folder that only this user may write: loading one runs its code.

    JAX's own persistent cache saves the compilation but not tracing and lowering, which are most of a warm start here
    (12 forward programs of 30 layers); this one saves all three.
    """

    def __init__(self, folder: pathlib.Path | None, fingerprint: str, target: DeviceSet | None = None) -> None:
        """
        Args:
            folder: None keeps nothing.
            fingerprint: of everything that decides the programs besides the code and the devices.
            target: the devices, where they are not this process's.
        """
        self._folder = folder
        device = jax.devices()[0]
        target = target or DeviceSet(device.platform, device.device_kind, len(jax.devices()))
        parts = (
            fingerprint,
            source_digest(),
            jax.__version__,
            target.platform,
            target.kind,
            str(target.number),
            f"{jax.process_index()} of {jax.process_count()}",
        )
        if jax.config.values.get("jax_disable_most_optimizations"):
            parts = (*parts, "compiled quickly")
        features = _cpu_features() if target.platform == "cpu" else ""
        self._key = hashlib.sha256("\0".join((*parts, features)).encode()).hexdigest()[:32]
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _path(self, name: str) -> pathlib.Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        return self._folder / f"{self._key}-{digest}.program"

    def load(self, name: str) -> Any | None:
        """The executable, or None when it is not there or cannot be used any more."""
        path = self._path(name)
        if path is None or not path.exists() or path.stat().st_uid != os.getuid():
            return None
        try:
            # Our own file, in a folder of mode 0700 owned by this user, checked above: not foreign input.
            *program, ids = _Unpickler(io.BytesIO(path.read_bytes())).load()
            devices = None if ids is None else [_device(one) for one in ids]
            return serialize_executable.deserialize_and_load(*program, execution_devices=devices)
        except Exception as e:  # a stale or torn file costs a compilation, never the start
            log.info("cached program %s is not usable (%s)", name, type(e).__name__)
            return None

    def store(self, name: str, compiled: Any) -> None:
        path = self._path(name)
        if path is None:
            return
        try:
            blob = io.BytesIO()
            _Pickler(blob).dump((*serialize_executable.serialize(compiled), _devices_of(compiled)))
            unfinished = None
            try:
                with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as f:
                    unfinished = f.name
                    f.write(blob.getbuffer())
                os.replace(unfinished, path)
            except OSError:
                if unfinished is not None:
                    with contextlib.suppress(OSError):
                        os.unlink(unfinished)  # or a full disk fills with them
                raise
        except Exception as e:  # not every backend can serialize; a full disk must not stop a server
            log.info("program %s was not cached (%s: %s)", name, type(e).__name__, e)


class _Pickler(pickle.Pickler):
    """Devices by their ids: a program's arguments name the mesh that pages are on."""

    def persistent_id(self, obj: Any) -> Any:
        return obj.id if isinstance(obj, jax.Device) else None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        return _device(pid)


def _device(number: int) -> Any:
    return next(device for device in jax.devices() if device.id == number)


def _devices_of(compiled: Any) -> tuple[int, ...] | None:
    """Numbers of the devices that an executable runs on, in its order; None where nothing says.

    jax loads an executable for all devices of the process, in their order, unless told otherwise; one that was made for fewer, such
    as a mesh of one device on a machine with two, then refuses its arguments.
    """
    for sharding in jax.tree.leaves(compiled.input_shardings):
        mesh: Any = sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None
        devices = list(mesh.devices.flat) if mesh else sorted(sharding.device_set, key=lambda one: one.id)
        return tuple(one.id for one in devices)
    return None


def compile_all(
    programs: Sequence[Program],
    cache: ProgramCache,
    on_done: Callable[[int, int], None] | None = None,
    agree: Callable[[bool], bool] | None = None,
) -> dict[ProgramKey, Any]:
    """Loads or compiles every program, several at once.

    Args:
        on_done: called with (how many are done, of how many) after each.
        agree: with several processes, asked whether all may use what they found, given that this one found everything. Where
            one compiles, all do: on GPUs a compilation waits for the others' measurements of its kernels.
    Returns:
        key -> executable, called like the function with arguments of exactly the declared shapes.
    """
    done: dict[ProgramKey, Any] = {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(MOST_AT_ONCE, max(2, cores))

    def build(program: Program) -> tuple[ProgramKey, Any]:
        jitted = jax.jit(program.fn, donate_argnums=program.donate)
        compiled = jitted.lower(*program.args).compile()
        cache.store(program.name, compiled)
        return program.key, compiled

    with (
        _kept_out_of_jax_cache(),
        concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="compile") as pool,
    ):
        for program, found in zip(programs, pool.map(lambda p: cache.load(p.name), programs), strict=True):
            if found is not None:
                done[program.key] = found
        if agree is not None and not agree(len(done) == len(programs)):
            done.clear()
        if on_done and done:
            on_done(len(done), len(programs))
        futures = [pool.submit(build, p) for p in programs if p.key not in done]
        for future in concurrent.futures.as_completed(futures):
            key, compiled = future.result()
            done[key] = compiled
            if on_done:
                on_done(len(done), len(programs))
    return done


@contextlib.contextmanager
def _kept_out_of_jax_cache() -> Generator[None]:
    """Nothing compiled inside goes into JAX's own persistent cache.

    On CPU an executable that came out of that cache cannot be serialized again: it loads, and its first call says
    "Function ... not found" (jaxlib 0.10). A program that changed sources but not its HLO would be stored so.
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _cpu_features() -> str:
    """What the compiler may have used of this CPU: an executable for another would die of an illegal instruction."""
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        pass
    return ""
