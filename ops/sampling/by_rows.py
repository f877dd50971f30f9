"""Rows of logits shared out between devices that hold a part of the vocabulary each.

Whatever sampling does to a row (sums, maxima, searches, branches that only some rows take) needs the whole of it: left to
the compiler, each of these becomes a collective of its own, some inside branches, where devices wait for ever for others
that took another branch. So the devices exchange parts first, and each finishes its own rows alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from ops.per_device import per_device

VOCAB_AXIS = "model"


def by_rows(function: Callable[..., Any], mesh: Mesh | None, logits_RV: jax.Array, rows: Any, tables: Any = ()) -> Any:
    """function(logits_RV, rows, tables), computed by each device of the `model` axis for its share of the rows.

    Two collectives: an all-to-all of the logits and an all-gather of the results. None, and all rows everywhere, where the
    axis does not divide the vocabulary, because every device then has all logits.

    Args:
        function: of any number of rows; what it gives for one depends on that row and the tables alone. Its results are
            arrays [R, ...] of int32 or float32.
        mesh: None on one device.
        rows: pytree of [R, ...].
        tables: pytree of what all rows read.
    Returns:
        function's results for all rows, on every device.
    """
    if mesh is None:
        return function(logits_RV, rows, tables)
    count, vocab = mesh.shape[VOCAB_AXIS], logits_RV.shape[1]
    split = count > 1 and vocab % count == 0

    def on_device(logits_RV: jax.Array, rows: Any, tables: Any) -> Any:
        if not split:
            return function(logits_RV, rows, tables)
        num_rows = logits_RV.shape[0]
        share = -(-num_rows // count)
        first = lax.axis_index(VOCAB_AXIS) * share

        def padded(x: jax.Array) -> jax.Array:
            return jnp.pad(x, ((0, share * count - num_rows), *[(0, 0)] * (x.ndim - 1)))

        mine = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(padded(x), first, share), rows)
        logits_rV = lax.all_to_all(padded(logits_RV), VOCAB_AXIS, 0, 1, tiled=True)
        packed, unpack = _pack(function(logits_rV, mine, tables))
        return unpack(lax.all_gather(packed, VOCAB_AXIS, tiled=True)[:num_rows])

    P = PartitionSpec
    logits = P(None, VOCAB_AXIS) if split else P()
    return per_device(on_device, mesh, (logits, P(), P()), P())(logits_RV, rows, tables)


def _pack(results: Any) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """The results as one int32 [r, words], so that one collective takes them; and what makes results of such rows."""
    leaves, structure = jax.tree.flatten(results)
    flat = [lax.bitcast_convert_type(leaf, jnp.int32).reshape(leaf.shape[0], -1) for leaf in leaves]

    def unpack(packed: jax.Array) -> Any:
        found, start = [], 0
        for leaf, words in zip(leaves, flat, strict=True):
            part = packed[:, start : start + words.shape[1]].reshape(packed.shape[0], *leaf.shape[1:])
            found.append(lax.bitcast_convert_type(part, leaf.dtype))
            start += words.shape[1]
        return jax.tree.unflatten(structure, found)

    return jnp.concatenate(flat, axis=1), unpack
