"""Device meshes: from the text of `--mesh` to a `jax.sharding.Mesh`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

MESH_AXES = ("data", "model", "expert")
"""Every mesh has these axes, in this order; an axis that was not named has size 1."""


def parse_mesh(text: str) -> dict[str, int]:
    """Reads "data=1,model=2" into axis sizes.

    Args:
        text: comma-separated `axis=size` pairs. An axis may be left out (size 1); at most one size may be -1, "what is
            left of the devices".
    Returns:
        a size for every axis of `MESH_AXES`.
    Raises:
        ValueError: naming the part that could not be read.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = (s.strip() for s in part.partition("="))
        if not equals or name not in MESH_AXES:
            raise ValueError(f"mesh {text!r}: {part!r} is not of the form axis=size with an axis of {list(MESH_AXES)}.")
        if name in sizes:
            raise ValueError(f"mesh {text!r}: the axis {name!r} is given twice.")
        try:
            sizes[name] = int(value)
        except ValueError:
            raise ValueError(f"mesh {text!r}: the size of {name!r} is {value!r}, not a whole number.") from None
        if sizes[name] < 1 and sizes[name] != -1:
            raise ValueError(
                f"mesh {text!r}: the size of {name!r} is {value}; it must be at least 1 (or -1: the rest)."
            )
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh {text!r}: only one axis may have the size -1.")
    return {name: sizes.get(name, 1) for name in MESH_AXES}


def make_mesh(text: str = "auto", devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of this process group's) with the axes data, model, expert.

    Args:
        text: see `parse_mesh`; "auto" puts every device on the `model` axis.
    Raises:
        ValueError: the sizes' product is not the number of devices (fewer is allowed in a single process: the first
            ones are taken).
    """
    available = list(jax.devices() if devices is None else devices)
    sizes = parse_mesh("model=-1" if text == "auto" else text)
    known = math.prod(size for size in sizes.values() if size != -1)
    for name, size in sizes.items():
        if size == -1:
            if len(available) % known:
                raise ValueError(f"mesh {text!r}: {len(available)} devices cannot be divided by {known}.")
            sizes[name] = len(available) // known
    wanted = math.prod(sizes.values())
    described = ",".join(f"{name}={size}" for name, size in sizes.items())
    if wanted > len(available) or (wanted < len(available) and jax.process_count() > 1):
        hint = ""
        if available and available[0].platform == "cpu":
            hint = f" On CPU, ask for them: --cpu-devices {wanted} (jax_num_cpu_devices)."
        raise ValueError(f"mesh {described} needs {wanted} devices; there are {len(available)}.{hint}")
    grid = np.array(available[:wanted]).reshape(tuple(sizes.values()))
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
