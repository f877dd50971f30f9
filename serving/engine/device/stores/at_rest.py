"""Weights that leave the devices and come back, and whether another checkpoint's fit in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

Rested = list[tuple[np.ndarray, Any]]
"""Arrays in host memory, each with the sharding that it had."""


def to_host(leaves: Sequence[jax.Array]) -> Rested:
    """Copies, not views: on the CPU a view would keep the device's buffer."""
    return [(np.array(leaf, copy=True), leaf.sharding) for leaf in leaves]


def to_devices(rested: Rested) -> tuple[jax.Array, ...]:
    """Back to where they were."""
    assert rested, "the weights were not kept"
    return tuple(jax.device_put(host, sharding) for host, sharding in rested)


def delete(tree: Any) -> None:
    """Gives the devices' memory back now, whoever still holds the arrays."""
    for leaf in jax.tree.leaves(tree):
        if not leaf.is_deleted():
            leaf.delete()


def check_fit(leaves: Sequence[jax.Array], served: Sequence[jax.Array]) -> None:
    """Whether programs that take the served arrays take others.

    Raises:
        ValueError: another structure, shape, dtype or placement, in a sentence.
    """
    if len(leaves) != len(served):
        raise ValueError(f"the checkpoint has {len(leaves)} arrays, the served model {len(served)}.")
    for i, (new, old) in enumerate(zip(leaves, served, strict=True)):
        if (new.shape, new.dtype) != (old.shape, old.dtype) or not new.sharding.is_equivalent_to(
            old.sharding, old.ndim
        ):
            raise ValueError(
                f"array {i} of the checkpoint is {new.dtype}{list(new.shape)}, the served model's {old.dtype}"
                f"{list(old.shape)}: only a checkpoint of the same shape can take its place."
            )
