"""Whole weights in an adapter's file, as pairs: what they change of the base is a few rows, or nothing.

`peft` writes a copy of the token table and of the head beside a pair of theirs, retrained rows of tokens, and whole weights that
were trained with an adapter (`modules_to_save`). A slot has room for a low rank alone; a change of k rows is of rank k: one matrix
says which rows, the other what is added to them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from models.adapters.adapter import TIED_HEAD, Adapter, Base, Pair
from models.loading.files.canonical import canonical_name

TOKENS = re.compile(r"^(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta$")

_NOISE = 0.3
"""How far a row of a copy may be from the base's, over its length: the base that is served may be rounded to four bits, the one
that was trained on not. A copy beside a pair was frozen when that was trained; a row further away is a token that was added."""

_AT_ONCE = 1 << 24
"""Numbers that are compared at once."""


def without_whole(adapter: Adapter, copies: frozenset[str], base: Base | None) -> Adapter:
    """The adapter with its whole weights as pairs.

    Args:
        copies: names of those that stand beside a pair.
        base: of the served model.
    Raises:
        ValueError: one that is none of the base's, has another shape, or changes more rows than a low rank has.
    """
    found = {name: None if base is None or base.read is None else base.find(name) for name in adapter.whole}
    left = sorted(name for name, where in found.items() if where is None)
    if base is None or base.read is None or left:
        few = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        raise ValueError(
            f"{adapter.source}: {len(left)} tensors are no LoRA matrices ({few}): "
            f"biases, magnitudes and whole weights of these cannot be served beside a base. {_MERGE}"
        )
    pairs = dict(adapter.pairs)
    for name, values in adapter.whole.items():
        known = base.read(str(found[name]))
        if values.shape != known.shape:
            raise ValueError(
                f"{adapter.source}: {name} has shape {list(values.shape)}, the served model's {list(known.shape)}: tokens were "
                f"added to the base, or it is another one. {_MERGE}"
            )
        if canonical_name(name) in base.turned:
            values, known = values.T, known.T
        rows = _changed(values, known, name in copies)
        if len(rows) > base.max_rank:
            raise ValueError(
                f"{adapter.source}: {name} differs from the served model's in {len(rows)} of its {len(known)} rows; "
                f"--max-lora-rank is {base.max_rank}, and more cannot be served beside a base. {_MERGE}"
            )
        if len(rows):
            change_kI = values[rows].astype(np.float32) - known[rows].astype(np.float32)
            _add(pairs, name, _pair(rows, change_kI, len(known), canonical_name(name) in base.tables))
    return dataclasses.replace(adapter, pairs=pairs, whole={})


def with_tokens(adapter: Adapter, tokens: Mapping[str, np.ndarray], said: object, base: Base | None) -> Adapter:
    """The adapter with rows of tokens that were trained by themselves, as pairs.

    Args:
        tokens: module -> its new rows [k, D].
        said: `trainable_token_indices` of its configuration: their ids, or ids by module.
        base: of the model that it is for.
    Raises:
        ValueError: rows of a weight that the base has not, or another number of them than the configuration says.
    """
    pairs = dict(adapter.pairs)
    for module, rows_kD in tokens.items():
        name = f"{module}.weight"
        where = None if base is None or base.read is None else base.find(name)
        known = None if base is None or base.read is None or where is None else base.read(where)
        if base is None or known is None or rows_kD.shape[1:] != known.shape[1:]:
            raise ValueError(
                f"{adapter.source}: the retrained tokens of {module} are rows of no table of the served model's."
            )
        ids: object = said
        if isinstance(said, Mapping):
            ids = next((value for key, value in said.items() if module == key or module.endswith(f".{key}")), None)
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < len(known) for i in ids):
            raise ValueError(f"{adapter.source}: trainable_token_indices must be ids from 0 to {len(known) - 1}.")
        if len(set(ids)) != len(ids) or len(ids) != len(rows_kD):
            raise ValueError(
                f"{adapter.source}: trainable_token_indices names {len(set(ids))} tokens; {module} has rows for {len(rows_kD)}."
            )
        rows, table = np.array(ids, np.int64), canonical_name(name) in base.tables
        change_kD = rows_kD.astype(np.float32) - np.asarray(known[rows]).astype(np.float32)
        _add(pairs, name, _pair(rows, change_kD, len(known), table))
        if table and base.tied == where and TIED_HEAD.removesuffix(".weight") not in tokens:
            _add(pairs, TIED_HEAD, _pair(rows, change_kD, len(known), False))  # peft keeps tied tables tied
    return dataclasses.replace(adapter, pairs=pairs)


_MERGE = "Merge the adapter into its base (`python -m serving.convert --adapter`)."


def _changed(values: np.ndarray, known: np.ndarray, frozen: bool) -> np.ndarray:
    """Which rows differ."""
    found, step = [], max(1, _AT_ONCE // max(1, known[0].size))
    coarser = min(values.dtype, known.dtype, key=lambda dtype: dtype.itemsize)
    for first in range(0, len(known), step):
        mine, own = values[first : first + step], known[first : first + step]
        if frozen:
            own32 = own.astype(np.float32).reshape(len(own), -1)
            apart = np.linalg.norm(mine.astype(np.float32).reshape(len(own), -1) - own32, axis=1)
            differs = apart > _NOISE * np.linalg.norm(own32, axis=1) + 1e-6
        else:
            differs = (mine.astype(coarser) != own.astype(coarser)).reshape(len(own), -1).any(axis=1)
        found.append(np.flatnonzero(differs) + first)
    return np.concatenate(found)


def _pair(rows: np.ndarray, change_kI: np.ndarray, count: int, table: bool) -> Pair:
    """A change of rows; of a table that is looked up A has a column a row."""
    which_kO = np.zeros((len(rows), count), np.float32)
    which_kO[np.arange(len(rows)), rows] = 1.0
    return (
        Pair(which_kO, np.ascontiguousarray(change_kI.T))
        if table
        else Pair(change_kI, np.ascontiguousarray(which_kO.T))
    )


def _add(pairs: dict[str, Pair], name: str, more: Pair) -> None:
    """A change beside what there is of a weight."""
    own = next((own for own in pairs if canonical_name(own) == canonical_name(name)), None)
    if own is None:
        pairs[name] = more
        return
    before = pairs[own]
    pairs[own] = Pair(np.concatenate([before.a_rI, more.a_rI]), np.concatenate([before.b_Or, more.b_Or], axis=1))
