"""The states of a model's recurrent layers on their devices."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["placements"])
@dataclasses.dataclass(frozen=True)
class States:
    """Of every slot, or every snapshot, what each layer keeps. Donate them to the step: they are updated in place.

    Attributes:
        arrays: name -> [slots + 1, ...], of replicas laid end to end; or their shapes.
        placements: (name, how its axes are split over the mesh) of each, static; () on a single device.
    """

    arrays: dict[str, Any]
    placements: tuple[tuple[str, PartitionSpec], ...] = ()
