"""Which mesh axis carries which logical axis: the one table that initialisation, loading and quantization read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axis; None means that every device has the whole of it."""

    batch: str | None = "data"  # decode rows and chunk rows of a step
    pages: str | None = None  # pages of the KV pool
    vocab: str | None = "model"  # rows of the embedding and of the logits
    embed: str | None = None  # the residual stream
    heads: str | None = "model"  # query heads, where they are apart from their KV head
    kv_heads: str | None = "model"  # KV heads, each with the query heads that read it
    ffw: str | None = "model"  # the hidden part of a feed-forward block
    experts: str | None = "expert"  # experts of a mixture
    latent: str | None = None  # the compressed K/V of latent attention

    def mesh_axis(self, logical: str | None) -> str | None:
        """The mesh axis of one logical axis.

        Raises:
            ValueError: there is no such logical axis.
        """
        if logical is None:
            return None
        names = [field.name for field in dataclasses.fields(self)]
        if logical not in names:
            raise ValueError(f"{logical!r} is not a logical axis; there are {names}.")
        return getattr(self, logical)


DEFAULT_RULES = ShardingRules()


def num_shards(mesh: Mesh | None, logical: str | None, rules: ShardingRules = DEFAULT_RULES) -> int:
    """Into how many pieces `mesh` cuts a logical axis."""
    axis = rules.mesh_axis(logical)
    return 1 if mesh is None or axis is None else mesh.shape[axis]


def to_sharding(mesh: Mesh, logical_axes: Sequence[str | None], rules: ShardingRules = DEFAULT_RULES) -> NamedSharding:
    """The sharding of an array whose dimensions are `logical_axes`.

    Raises:
        ValueError: an unknown logical axis, or two of them on the same mesh axis.
    """
    axes = [rules.mesh_axis(logical) for logical in logical_axes]
    for axis in filter(None, axes):
        if axis not in mesh.shape:
            raise ValueError(f"the rules name the mesh axis {axis!r}; the mesh has {list(mesh.shape)}.")
        if axes.count(axis) > 1:
            raise ValueError(
                f"the logical axes {list(logical_axes)} collide: mesh axis {axis!r} would split two of them."
            )
    return NamedSharding(mesh, PartitionSpec(*axes))
