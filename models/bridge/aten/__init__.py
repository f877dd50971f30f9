"""torch's operations in JAX, by name, for what transformers' models use of them when nothing is changed in place.

An operation is looked up with its overload first ("max.dim"), then without ("max"). Whole numbers are int32 here: ids and
positions are. Attention, products and experts are not here but in `module.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from models.bridge.aten import elementwise, layers, places, shapes  # they fill the table
from models.bridge.aten.table import OPS

__all__ = ["elementwise", "known", "layers", "operation", "places", "shapes"]


def operation(name: str) -> Callable[..., Any]:
    """The function of one of torch's names ("aten.add.Tensor").

    Raises:
        NotImplementedError: it is not here.
    """
    base = name.removeprefix("aten.").removeprefix("prims.")
    for key in (base, base.partition(".")[0]):
        if key in OPS:
            return OPS[key]
    raise NotImplementedError(name)


def known(name: str) -> bool:
    """Whether an operation is here."""
    try:
        operation(name)
    except NotImplementedError:
        return False
    return True
