"""Stored weights as arrays and plain data, for files that keep them between starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ops.linear.weights.base import StoredWeight
from ops.linear.weights.blocks import BlockWeight, Form, Stretch
from ops.linear.weights.int8 import Int8Weight, PackedInt8Weight

DENSE = "dense"
KINDS: dict[str, type[Any]] = {"int8": Int8Weight, "packed int8": PackedInt8Weight, "blocks": BlockWeight}


def to_plain(weight: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(kind, its arrays by name, everything else as JSON holds it) of a dense array or a stored weight.

    Raises:
        ValueError: a type that has no such form.
    """
    if not isinstance(weight, StoredWeight):
        return DENSE, {"values": weight}, {}
    for kind, known in KINDS.items():
        if type(weight) is known:
            fields: dict[str, Any] = {field.name: getattr(weight, field.name) for field in dataclasses.fields(known)}
            arrays = {name: value for name, value in fields.items() if hasattr(value, "nbytes")}
            meta = {name: value for name, value in fields.items() if name not in arrays}
            if "stretches" in meta:
                meta["stretches"] = [dataclasses.asdict(stretch) for stretch in meta["stretches"]]
            return kind, arrays, meta
    raise ValueError(f"a {type(weight).__name__} is not kept.")


def from_plain(kind: str, arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> Any:
    """The inverse of `to_plain`, from what came out of JSON.

    Raises:
        ValueError, TypeError, KeyError: not what `to_plain` gives.
    """
    if kind == DENSE:
        return arrays["values"]
    fields = dict(meta)
    if "shape" in fields:
        fields["shape"] = tuple(fields["shape"])
    if "stretches" in fields:
        fields["stretches"] = tuple(
            Stretch(Form(**stretch["form"]), stretch["panels"], stretch["offset"]) for stretch in fields["stretches"]
        )
    return KINDS[kind](**arrays, **fields)
