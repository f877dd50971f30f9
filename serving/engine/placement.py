"""Where a program's arrays are on a mesh: weights and pages as they are cut, everything else on every device."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ops.paged_attention import KVPages
from ops.paged_attention.pages import MODEL_AXIS
from serving.engine.compiling import Program


def place(mesh: Mesh | None, tree: Any) -> Any:
    """The arrays, whole on every device of the mesh; as they are without one.

    With several processes each puts its own copy on its own devices: they must have the same content everywhere.
    """
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(array: Any) -> jax.Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, everywhere, lambda index: host[index])

    return jax.tree.map(put, tree)


def placed(mesh: Mesh | None, program: Program) -> Program:
    """The program with the places of its arguments and results said, so that each call's results fit the next call.

    Arguments that have no sharding, and all results but pages, are whole on every device: they are small, and the host
    reads and writes them. Pages stay cut by KV heads.
    """
    if mesh is None:
        return program
    everywhere = NamedSharding(mesh, PartitionSpec())

    def argument(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)
        return leaf

    def result(value: Any) -> Any:
        if isinstance(value, KVPages):
            heads = PartitionSpec(None, MODEL_AXIS) if value.sharded else PartitionSpec()
            return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, heads))
        return jax.lax.with_sharding_constraint(value, everywhere)

    def fn(*args: Any) -> Any:
        return jax.tree.map(result, program.fn(*args), is_leaf=lambda value: isinstance(value, KVPages))

    return dataclasses.replace(program, fn=fn, args=jax.tree.map(argument, program.args))
