"""What a weight may be: a dense array, or a type of its own that knows its product, its rows, its experts and its packing.

One file a type; `base.StoredWeight` says what each does. `stored` wraps a dense array, so that all are asked alike.
"""

from __future__ import annotations

import jax
import numpy as np

from ops.linear.weights.base import Around, Experts, StoredWeight, single_cpu
from ops.linear.weights.block_round import four_bits
from ops.linear.weights.dense import DenseWeight
from ops.linear.weights.int8 import Int8Weight, PackedInt8Weight, quantize_int8
from ops.native import available

__all__ = [
    "SCHEMES",
    "Around",
    "DenseWeight",
    "Experts",
    "Int8Weight",
    "PackedInt8Weight",
    "StoredWeight",
    "Weight",
    "pack",
    "quantize",
    "stored",
]

Weight = jax.Array | StoredWeight
SCHEMES = ("int8", "int4", "stored")


def stored(weight: Weight) -> StoredWeight:
    """The weight as something that computes."""
    return weight if isinstance(weight, StoredWeight) else DenseWeight(weight)


def quantize(weight_OI: jax.Array, scheme: str | None) -> Weight:
    """Converts a dense weight to the type that `scheme` names.

    Args:
        weight_OI: float array; leading axes before O are allowed.
        scheme: None keeps it dense; "int8" is symmetric int8 with one scale an output channel, rotated where every
            device's part of I is whole blocks; "int4" is four bits in blocks of 32 on one CPU device with native kernels,
            and int8 elsewhere; "stored" keeps what a checkpoint has in blocks, and of dense weights makes int8.
    Raises:
        ValueError: the scheme is not known.
    """
    if scheme is None:
        return weight_OI
    if scheme == "int4" and weight_OI.ndim == 2 and single_cpu(weight_OI) and available():
        return jax.device_put(four_bits(np.asarray(weight_OI)))
    if scheme in SCHEMES:
        return quantize_int8(weight_OI)
    raise ValueError(f"Quantization {scheme!r} is not supported; known ones are {', '.join(SCHEMES)}.")


def pack(weight: Weight) -> Weight:
    """The weight in the layout of this machine's fastest product; unchanged where there is no other.

    Only a weight on a single CPU device has one: the kernels are not partitioned over a mesh.
    """
    return weight.packed() if isinstance(weight, StoredWeight) else weight
