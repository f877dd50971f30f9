"""GPUs described to XLA's compiler, which then needs none: the device properties that its decisions rest on."""

from __future__ import annotations

import dataclasses
from typing import Any

from serving.plan.chips import Target


@dataclasses.dataclass(frozen=True)
class Properties:
    """What CUDA's cudaDeviceProp says of a GPU.

    Attributes:
        device_name: as the driver calls it.
        capability: compute capability, (major, minor).
        cores: multiprocessors.
        fpus: float32 lanes of one.
        shared: bytes of shared memory of one; a block may have 1 KiB less.
        l2: bytes of the cache between them.
        ghz: boost clock.
    """

    device_name: str
    capability: tuple[int, int]
    cores: int
    fpus: int
    shared: int
    l2: int
    ghz: float


PROPERTIES = {
    "a100": Properties("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 << 10, 40 << 20, 1.41),
    "h100": Properties("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228 << 10, 50 << 20, 1.98),
    "h200": Properties("NVIDIA H200", (9, 0), 132, 128, 228 << 10, 50 << 20, 1.98),
}
"""Shared memory and lanes from NVIDIA's CUDA C++ programming guide (technical specifications per compute capability),
the rest from the chips' data sheets."""


def target_config(target: Target) -> str:
    """The chip as a text proto of XLA's GpuTargetConfigProto."""
    chip, has = target.chip, PROPERTIES[target.chip.name]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {has.shared} shared_memory_per_block_optin: {has.shared - 1024}
  core_count: {has.cores} fpus_per_core: {has.fpus} clock_rate_ghz: {has.ghz}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {has.l2} device_memory_size: {chip.memory}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {has.capability[0]} minor: {has.capability[1]} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 13 }}
device_description_str: "{has.device_name}"
"""


def topology_devices(target: Target) -> list[Any]:
    """Descriptions of the target's devices, all in one host, to compile for.

    Raises:
        ValueError: the plugin cannot describe it.
    """
    from jax.experimental import topologies

    shape = f"1x1x{target.num_devices}"  # slices, hosts, devices a host
    try:
        described = topologies.get_topology_desc("", "cuda", topology=shape, target_config=target_config(target))
    except Exception as e:
        raise ValueError(
            f"topology {target.text!r}: the GPU compiler cannot be used ({str(e).splitlines()[0]})."
        ) from e
    return list(described.devices)
