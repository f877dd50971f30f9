"""Several processes as one: who they are, and starting `jax.distributed` between them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from typing import Any

import jax

from sharding.address import address_towards

AUTO = "auto"
LWS_PORT = 8476
"""Of the coordinator in a LeaderWorkerSet, which names a host and no port; JAX_COORDINATOR_PORT overrides it."""

JOIN_TIMEOUT_S = 600
"""How long a process waits for the others to be started: a cluster may take minutes to place its last pod."""

HEARTBEAT_TIMEOUT_S = 12
"""When JAX gives a silent process up and aborts the others. The engine's own watch is faster (serving/processes) and says
more; this one still works when Python does not."""

_JAX_ENVIRONMENTS = {
    "GkeTpuCluster": "Cloud TPU on Kubernetes Engine",
    "GceTpuCluster": "Cloud TPU on Compute Engine",
    "SlurmCluster": "Slurm",
    "OmpiCluster": "Open MPI",
    "K8sCluster": "a Kubernetes Job",
}


@dataclasses.dataclass(frozen=True)
class Processes:
    """One process's place among those of an engine.

    Attributes:
        coordinator: "host:port" at which process 0 listens.
        count: how many there are.
        index: which one this is.
        found_by: who said so.
        local_devices: ids of the devices that this process may use; None for all of its host's.
    """

    coordinator: str
    count: int
    index: int
    found_by: str = "flags"
    local_devices: tuple[int, ...] | None = None

    @property
    def host(self) -> str:
        """The coordinator's host, without brackets."""
        return self.coordinator.rpartition(":")[0].strip("[]")


def find(
    coordinator: str | None,
    count: int | None = None,
    index: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Processes | None:
    """What flags and environment say about the processes of this engine.

    Args:
        coordinator: "host:port", or "auto": ask LeaderWorkerSet's variables, and then JAX's own detection (Cloud TPU, Slurm,
            Open MPI, Kubernetes Jobs). None: this process is alone.
        count, index: needed with "host:port"; with "auto" they are found.
        environment: instead of the process's own variables, for LeaderWorkerSet.
    Returns:
        None when this process is alone.
    Raises:
        ValueError: values that do not fit together, or an environment in which nothing is found.
    """
    if coordinator is None:
        if count is not None or index is not None:
            raise ValueError(
                "--num-processes and --process-id need --coordinator: HOST:PORT of process 0, or auto to ask Cloud TPU, "
                "LeaderWorkerSet, Kubernetes, Slurm or Open MPI."
            )
        return None
    if coordinator == AUTO:
        if count is not None or index is not None:
            raise ValueError("--coordinator auto finds --num-processes and --process-id itself; leave them out.")
        found = _leader_worker_set(os.environ if environment is None else environment) or _ask_jax()
        if found is None:
            raise ValueError(
                "--coordinator auto found no several processes here: no LeaderWorkerSet (LWS_LEADER_ADDRESS), and JAX "
                f"sees none of {', '.join(_JAX_ENVIRONMENTS.values())}. Say --coordinator HOST:PORT --num-processes N "
                "--process-id I."
            )
        return found if found.count > 1 else None
    host, colon, port = coordinator.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"--coordinator is {coordinator!r}; it must be HOST:PORT of process 0, or auto.")
    if count is None or index is None:
        raise ValueError("--coordinator HOST:PORT needs --num-processes and --process-id.")
    if not 0 <= index < count:
        raise ValueError(f"--process-id is {index}; with --num-processes {count} it must be from 0 to {count - 1}.")
    return Processes(coordinator, count, index) if count > 1 else None


def join(processes: Processes) -> None:
    """Makes this process one of several. Before anything uses a device.

    Raises:
        ValueError: the others could not be reached.
    """
    # Between the processes of CPU meshes (it is the default where there is one; "none" would only fail later).
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _name_for_gloo(processes.host)
    # It would take SIGTERM for itself; what a server does about it is the server's affair.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_check_proxy_envs", False)
    try:
        jax.distributed.initialize(
            processes.coordinator,
            processes.count,
            processes.index,
            local_device_ids=None if processes.local_devices is None else list(processes.local_devices),
            cluster_detection_method="deactivate",
            initialization_timeout=JOIN_TIMEOUT_S,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        )
    except RuntimeError as e:
        raise ValueError(
            f"process {processes.index} of {processes.count} could not join the others at {processes.coordinator}: "
            f"{str(e).splitlines()[0]}"
        ) from e


def _name_for_gloo(coordinator: str) -> None:
    """Has gloo tell the other processes an address at which they reach this one. By itself it takes what this machine's name
    stands for: nothing, where its own machine does not know it, and then no process starts; or 127.0.1.1, where the others find
    themselves. jax has no setting for it."""
    from jax._src import xla_bridge

    made_by: Any = getattr(xla_bridge, "_jax", None)
    if hasattr(made_by, "make_gloo_tcp_collectives"):
        with contextlib.suppress(OSError):  # nobody knows where process 0 is: `initialize` says so
            here = address_towards(coordinator)
            made_by.make_gloo_tcp_collectives = functools.partial(made_by.make_gloo_tcp_collectives, hostname=here)


def publish(name: str, value: str) -> None:
    """Leaves a text for the other processes."""
    _store().key_value_set(f"jaxserve/{name}", value)


def lookup(name: str, timeout_s: float) -> str:
    """A text that another process leaves, waiting for it.

    Raises:
        ValueError: it did not come in time.
    """
    try:
        return _store().blocking_key_value_get(f"jaxserve/{name}", int(timeout_s * 1000))
    except Exception as e:  # jaxlib's own error types
        raise ValueError(f"process 0 did not publish its {name} within {timeout_s:g} s.") from e


def _store() -> Any:
    """The key-value store of `jax.distributed`, which has no public name; Orbax uses the same one."""
    from jax._src import distributed

    assert distributed.global_state.client is not None, "join() comes first"
    return distributed.global_state.client


def _leader_worker_set(environment: Mapping[str, str]) -> Processes | None:
    """LeaderWorkerSet sets these in every pod of a group: https://lws.sigs.k8s.io/docs/reference/labels-annotations-and-environment-variables/"""
    address, size = environment.get("LWS_LEADER_ADDRESS"), environment.get("LWS_GROUP_SIZE")
    index = environment.get("LWS_WORKER_INDEX")
    if address is None or size is None or index is None:
        return None
    port = environment.get("JAX_COORDINATOR_PORT", str(LWS_PORT))
    return Processes(f"{address}:{port}", int(size), int(index), "LeaderWorkerSet")


def _ask_jax() -> Processes | None:
    """JAX's own cluster detection, taken one environment at a time so that it can be said which one answered."""
    from jax._src.clusters import ClusterEnv

    for environment in ClusterEnv._cluster_types:
        if environment.opt_in_only_method or not environment.is_env_present():
            continue
        port = os.environ.get("JAX_COORDINATOR_PORT")
        address = environment.get_coordinator_address(timeout_secs=JOIN_TIMEOUT_S, override_coordinator_port=port)
        name = _JAX_ENVIRONMENTS.get(environment.__name__, environment.__name__)
        return Processes(
            address,
            environment.get_process_count(),
            environment.get_process_id(),
            name,
            _local_devices(environment.get_local_process_id(), os.environ),
        )
    return None


def _local_devices(local_index: int | None, environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """Of several processes on a host each takes one device; a process that has its host to itself takes all."""
    tasks = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
    here = re.match(r"\d+", tasks)  # Slurm writes "4(x2),3"
    return None if local_index is None or here is None or int(here[0]) == 1 else (local_index,)
