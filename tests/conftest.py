"""Every test runs on the CPU backend, whatever else is installed."""

import os
import pathlib
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

HERE = pathlib.Path(__file__).parent
QUICK = (
    "serving/boot", "serving/engine", "serving/fleet", "serving/media", "serving/processes", "serving/service",
    "serving/training", "serving/transfer",
)  # fmt: skip
"""Folders whose programs are compiled quickly: tiny ones that run a few times, of which compiling is nearly all. What is computed
is the same: XLA's own passes run, LLVM's do not. Real models are compiled as a server compiles them."""


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(request):
    """In this process, and in those that the module's tests start."""
    folder = request.path.parent.relative_to(HERE).as_posix()
    real = any(item.get_closest_marker("real_model") for item in request.session.items if item.path == request.path)
    if real or not any(f"{folder}/".startswith(f"{quick}/") for quick in QUICK):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        if "jax" in sys.modules:  # else it reads the environment
            sys.modules["jax"].config.update("jax_disable_most_optimizations", True)
        yield
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_disable_most_optimizations", False)


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
