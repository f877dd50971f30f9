"""Functions that each device runs on its own pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh


def per_device(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map` over the axes of `mesh` that are not split already.

    Inside a function that runs once a replica (a shard_map over the data axis alone) those are the others: shapes are a
    replica's there, and specs may not name its axis.
    """
    around = jax.sharding.get_abstract_mesh()
    split = set(around.manual_axes)
    return jax.shard_map(
        function,
        mesh=None if split else mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(mesh.axis_names) - split,
        check_vma=False,
    )
