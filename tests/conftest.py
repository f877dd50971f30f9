"""Every test runs on the CPU backend, whatever else is installed, and in the same environment, whoever's shell it is."""

import gc
import os
import pathlib
import re
import shutil
import sys
import tempfile

import pytest
from hypothesis import HealthCheck, settings

# The same examples every time: a failure on one machine is a failure on all. And a slow machine is none.
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

os.environ.setdefault("JAX_PLATFORMS", "cpu")

for _name in ("no_proxy", "NO_PROXY"):  # what tests start answers here, whatever leads outside
    os.environ[_name] = ",".join(filter(None, [os.environ.get(_name), "127.0.0.1", "localhost", "::1"]))
for _name in list(os.environ):
    # Keys that servers would ask for or send, a Redis of somebody's, where systemd listens, what a cluster tells its processes,
    # how wide a terminal is and whether it has colours.
    if re.fullmatch(
        r"JAXSERVE_(.*_?API_KEY|REDIS_URL|TRACEBACK|URL)|NOTIFY_SOCKET|(LWS|OTEL)_.*|COLUMNS|FORCE_COLOR", _name
    ):
        del os.environ[_name]

HERE = pathlib.Path(__file__).parent
QUICK = (
    "models", "ops/linear/test_grouped.py", "ops/test_experts.py", "ops/test_pallas_gpu.py", "ops/test_pallas_tpu.py",
    "serving/adapters", "serving/boot", "serving/engine", "serving/fleet", "serving/media", "serving/processes",
    "serving/service", "serving/training", "serving/transfer",
)  # fmt: skip
"""Folders and files whose programs are compiled quickly: tiny ones that run a few times, of which compiling is nearly all. What is
computed is the same: XLA's own passes run, LLVM's do not. Real models are compiled as a server compiles them."""


def pytest_configure(config):
    """What tiny engines compile (`tests/tiny.py`) is kept for all test processes of this run, and no longer."""
    if not hasattr(config, "workerinput"):
        os.environ["JAXSERVE_TEST_PROGRAMS"] = tempfile.mkdtemp(prefix="jaxserve-test-programs-")


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop("JAXSERVE_TEST_PROGRAMS", ""), ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(request):
    """In this process, and in those that the module's tests start."""
    path = request.path.relative_to(HERE).as_posix()
    real = any(item.get_closest_marker("real_model") for item in request.session.items if item.path == request.path)
    if real or not any(f"{path}/".startswith(f"{quick}/") for quick in QUICK):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        if "jax" in sys.modules:  # else it reads the environment
            sys.modules["jax"].config.update("jax_disable_most_optimizations", True)
        yield
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_disable_most_optimizations", False)


MOST_MAPPINGS = 20_000
"""Of this process, before programs are let go. Linux gives a process 65,530; a program compiled for CPUs takes three at least, and
JAX keeps every one that ever ran. Past the last one, the compiler dies by a segmentation fault."""


@pytest.fixture(autouse=True, scope="module")
def programs_let_go():
    """What a worker compiled for modules before, once it holds much."""
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if "jax" in sys.modules and mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """name -> the directory of a tiny random checkpoint of `tests/models/tiny.py`, made once for all test processes."""
    from tests.models.tiny_reference import make_reference, slug

    shared = tmp_path_factory.getbasetemp().parent / "tiny-models"
    shared.mkdir(exist_ok=True)

    def reference(name: str) -> pathlib.Path:
        target = shared / slug(name)
        if not target.exists():
            making = tmp_path_factory.mktemp("making")
            make_reference(name, making)
            try:
                making.rename(target)
            except OSError:  # another process was faster
                assert target.exists()
        return target

    return reference
