"""Where a program's arrays are on a mesh, and how one program becomes every replica's.

Weights are as they are cut. Over the `data` axis a mesh holds replicas: each has its own pages, slots and rows of a step, and
all run the same program on theirs. Programs are written for one replica: their arrays are laid end to end along the first
axis, and each device sees its replica's part. So nothing crosses replicas but what the host reads: that is whole on every
device, and needs an all-gather.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ops.paged_attention import KVPages
from ops.paged_attention.pages import DATA_AXIS
from ops.recurrent import States
from serving.engine.device.programs.compiling import Program
from serving.engine.device.programs.state import DeviceState

EVERYWHERE = PartitionSpec()
BY_REPLICA = PartitionSpec(DATA_AXIS)


def num_replicas(mesh: Mesh | None) -> int:
    """How many copies of the model the mesh holds."""
    return 1 if mesh is None else mesh.shape[DATA_AXIS]


def place(mesh: Mesh | None, tree: Any, spec: PartitionSpec = EVERYWHERE) -> Any:
    """The arrays on the mesh's devices; as they are without one.

    With several processes each puts down its devices' part: the content must be the same everywhere.
    """
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, spec)

    def put(array: Any) -> jax.Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def on_this_process(array: jax.Array) -> np.ndarray:
    """The content of an array; of one that is spread by replica over several processes, this one's part."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def of_one(mesh: Mesh | None, array: Any) -> jax.ShapeDtypeStruct:
    """What one replica sees of an array that is laid end to end."""
    rows, *rest = array.shape
    shape = (rows // num_replicas(mesh), *rest)
    return jax.ShapeDtypeStruct(shape, array.dtype, sharding=array.sharding)


def placed(mesh: Mesh | None, program: Program) -> Program:
    """The program with the places of its arguments and results said, so that each call's results fit the next call.

    Arguments that have no sharding are whole on every device, or spread by replica if each runs the program and they are not
    shared. Of results, pages and recurrent states stay as they are cut, device state and what is `resident` stays with its
    replica; the host reads the rest.
    """
    if mesh is None:
        return program
    replicas = num_replicas(mesh)
    split = replicas > 1 and program.shared is not None
    shared = set(range(len(program.args))) if not split else set(program.shared or ())

    def argument(leaf: Any, whole: bool) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        sharding = leaf.sharding or NamedSharding(mesh, EVERYWHERE if whole else BY_REPLICA)
        shape = leaf.shape if whole else (leaf.shape[0] * replicas, *leaf.shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

    def result(value: Any) -> Any:
        if isinstance(value, States):
            cut = {name: NamedSharding(mesh, spec) for name, spec in value.placements}
            return dataclasses.replace(value, arrays=jax.lax.with_sharding_constraint(value.arrays, cut))
        if isinstance(value, KVPages):
            spec = value.placement
        elif split and (program.resident or isinstance(value, DeviceState)):
            spec = BY_REPLICA
        else:
            spec = EVERYWHERE
        return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, spec))

    each = program.fn
    if split:
        each = jax.shard_map(
            program.fn,
            mesh=mesh,
            in_specs=tuple(EVERYWHERE if i in shared else BY_REPLICA for i in range(len(program.args))),
            out_specs=BY_REPLICA,
            axis_names={DATA_AXIS},
            check_vma=False,
        )

    def fn(*args: Any) -> Any:
        return jax.tree.map(
            result, each(*args), is_leaf=lambda value: isinstance(value, KVPages | DeviceState | States)
        )

    args = tuple(
        jax.tree.map(lambda leaf, whole=i in shared: argument(leaf, whole), arg) for i, arg in enumerate(program.args)
    )
    return dataclasses.replace(program, fn=fn, args=args)
