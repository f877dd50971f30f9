"""Keeping compiled programs for a server that will start from them: `serving.plan --save`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from ops.linear.weights.group_pack import Packing
from serving.engine.api.config import EngineConfig
from serving.engine.device.programs.bundle import Bundle, digest
from serving.engine.device.programs.compiling import DeviceSet, compile_all
from serving.engine.device.sizing import resolve_sizes
from serving.plan.planner import Plan
from serving.plan.programs import AbstractEngine, abstract_model, config_of
from serving.plan.topology import devices
from sharding.mesh import make_mesh

HOST_CHIPS = {"v5e": 8, "v6e": 8, "v5p": 4}
"""Chips of the largest TPU host: more of them are several processes, each with programs of its own."""


def save(plan: Plan, folder: pathlib.Path, on_done: Callable[[int, int], None] | None = None) -> Bundle:
    """Compiles every program of the planned server, all layers, and writes them as a bundle.

    Args:
        on_done: told (how many are done, of how many).
    Raises:
        ValueError: the plan does not fit, needs several hosts, or the compiler's programs cannot be kept.
    """
    request = plan.request
    target = request.target
    if not plan.fits:
        raise ValueError("the model does not fit: there is no server to keep programs for.")
    if target.num_devices > HOST_CHIPS.get(target.chip.name, 8 if target.platform == "gpu" else target.num_devices):
        raise ValueError(
            f"--save keeps the programs of one process, but {target.text} is several hosts, each with a process of its own: "
            "let them compile, and keep their --compile-cache."
        )
    if isinstance(request.quantization, Packing):
        raise ValueError(
            "--save keeps programs for weights whose shapes the configuration tells, and of a packed checkpoint only its tensors "
            "do: let the server compile, or say --quantization none for dense weights."
        )
    model_config = config_of(request.hf)
    mesh = make_mesh(request.mesh, devices(target))
    model = abstract_model(model_config, mesh, request.dtype, request.quantization, request.max_model_len)
    settings: dict[str, Any] = {
        "dtype": request.dtype,
        "quantization": request.scheme or "none",
        "kv_cache_dtype": request.kv_dtype,
        "max_model_len": request.max_model_len,
        "max_num_seqs": request.max_num_seqs,
        "max_num_batched_tokens": request.max_num_batched_tokens,
        "page_size": request.page_size,
        "kv_cache_memory": plan.num_pages * plan.kv_page * target.num_devices,
        "mesh": request.mesh,
    }
    sizes = resolve_sizes(
        EngineConfig(**settings),
        model,
        model_config.max_positions,
        request.dtype,
        mesh,
        platform=target.platform,
    )
    engine = AbstractEngine(model, sizes, mesh)
    programs = list(engine.programs().values())
    first = mesh.devices.flat[0]
    number = len(jax.devices()) if target.platform == "cpu" else target.num_devices
    bundle = Bundle(
        folder,
        settings,
        dataclasses.asdict(sizes),
        digest(model_config),
        DeviceSet(first.platform, first.device_kind, number),
        jax.__version__,
        tuple(program.name for program in programs),
    )
    cache = bundle.cache()
    compile_all(programs, cache, on_done)
    kept = sum(1 for _ in (folder / "programs").glob("*.program"))
    if kept < len(programs):
        raise ValueError(
            f"the compiler's programs for {target.text} cannot be serialized: {kept} of {len(programs)} were."
        )
    bundle.write()
    return bundle
