"""The devices of a target, described to the compilers, which need no hardware then."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from serving.installation import extra
from serving.plan.chips import Target
from serving.plan.cuda import topology_devices


def tpu_compiler() -> bool:
    """Whether libtpu is installed, which holds the TPU compiler (the extra tpu; no TPU is needed)."""
    return bool(os.environ.get("TPU_LIBRARY_PATH")) or importlib.util.find_spec("libtpu") is not None


def gpu_compiler() -> bool:
    """Whether JAX's CUDA plugin is installed, which holds the GPU compiler (the extra cuda; no GPU is needed)."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") is not None for version in (13, 12))


def prepare(targets: list[Target]) -> None:
    """Settings for compiling without hardware. Call it before JAX makes its first array.

    Raises:
        ValueError: the compiler for a target is not installed.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")  # for CUDA's plugin too: it then looks for no driver
    if any(target.platform == "gpu" for target in targets) and not gpu_compiler():
        raise ValueError(
            "Programs for GPU need the compiler in JAX's CUDA plugin, which is not installed (4 GB on disk; no GPU is needed): "
            f"{extra('cuda')}."
        )
    if any(target.platform == "tpu" for target in targets):
        if not tpu_compiler():
            raise ValueError(
                "Programs for TPU need the compiler in libtpu, which is not installed (700 MB on disk; no TPU is needed): "
                f"{extra('tpu')}."
            )
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # ask no cloud metadata server what this machine is
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is locked: compiling shares no device
    cpus = max((target.num_devices for target in targets if target.platform == "cpu"), default=1)
    if cpus > 1:
        jax.config.update("jax_num_cpu_devices", cpus)


def devices(target: Target) -> list[Any]:
    """The target's devices; those of accelerators are descriptions that can be compiled for.

    Raises:
        ValueError: the compiler knows no such topology.
    """
    import jax
    from jax.experimental import topologies

    if target.platform == "cpu":
        return jax.devices("cpu")[: target.num_devices]
    if target.platform == "gpu":
        return topology_devices(target)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=_compilable(target)).devices)
    except Exception as e:
        raise ValueError(f"topology {target.text!r}: the TPU compiler refuses it ({str(e).splitlines()[0]}).") from e


def _compilable(target: Target) -> str:
    """The topology's name for the compiler, which knows whole hosts only: a part of one is compiled as that host."""
    host = {"v5e": "2x2", "v6e": "2x2", "v5p": "2x2x1"}[target.chip.name]
    return f"{target.chip.name}:{host}" if target.num_devices < 4 else target.text
