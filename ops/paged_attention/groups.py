"""Which layers share pages. A page holds a span of one sequence for a *group* of layers that attend alike: all back, or all as
far. So what is behind a window can be given up in the groups that have one, while the others keep theirs.

All groups have as many arrays, and the i-th of each group's layers has its part of a page in the i-th: any group may take any
page, and nothing is divided up beforehand. (Kwon et al. 2023, arXiv:2309.06180, describe pages; the idea of groups of one size
is vLLM's.) A model whose layers are all alike is one group.

Where layers keep different numbers of a position, a page of an array holds one layer of the kind that keeps most, or several of
one that keeps a whole part of that (`shared.py`). Gemma 4 31B has 16 heads of 256 in fifty layers with windows and 4 of 512 in
ten without: a page of ten arrays holds ten layers' tokens or, in the group that sees all, twenty's, of which it has ten, so
five arrays do. Heads that are smaller and of which no number of layers fills a page are filled up with zeros (`attend` does).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

from ops.paged_attention.batch import KVSpec

MOST_GROUPS = 16
"""Each group has a page table, to be filled in and read in every step."""

GROUP_COST = 0.01
"""What a group more weighs against the part of a sequence's memory that lies unused because a group has fewer layers than the
others."""


@dataclasses.dataclass(frozen=True)
class KVGroups:
    """Hashable and static.

    Attributes:
        windows: of each group, how many positions back its layers attend at most; None for all.
        arrays: of each array of pages, what its layers keep.
        places: (group, array, part of its pages) of each layer; None with a single group, where layer i has array i. Without
            layers that keep pages there is no group.
    """

    windows: tuple[int | None, ...]
    arrays: tuple[KVSpec, ...]
    places: tuple[tuple[int, int, int], ...] | None = None

    @classmethod
    def of(cls, specs: Sequence[KVSpec], layers_per_page: int | None = None) -> KVGroups:
        """Groups of so many layers (of the kind that keeps most), the last ones of a kind smaller where need be; None, or as many
        as there are, for one group.

        Raises:
            ValueError: layers that keep different things cannot share arrays.
        """
        if not specs:
            return cls((), (), ())
        if layers_per_page is None or layers_per_page >= len(specs):
            limited = [spec.window for spec in specs if spec.window is not None]
            return cls((max(limited) if len(limited) == len(specs) else None,), tuple(specs))
        if (shared := _shared(specs)) is None:
            raise ValueError(f"layers that keep {_shapes(specs)} cannot share pages.")
        windows: list[int | None] = []
        open_groups: dict[tuple[int | None, KVSpec], tuple[int, int]] = {}  # kind -> (its last group, layers in it)
        places = []
        for spec in specs:
            kind, parts = shared.kind_of(spec), shared.parts_of(spec)
            group, taken = open_groups.get((spec.window, kind), (-1, layers_per_page * parts))
            if taken == layers_per_page * parts:
                group, taken = len(windows), 0
                windows.append(spec.window)
            places.append((group, taken // parts, taken % parts))
            open_groups[spec.window, kind] = group, taken + 1
        return cls(tuple(windows), (shared,) * layers_per_page, tuple(places))


def layers_per_page(specs: Sequence[KVSpec], max_len: int) -> int:
    """How many layers (of the kind that keeps most) a group is to have, for sequences of up to `max_len` tokens: all of them where
    no window would free anything, or where the layers cannot share arrays, or would take more memory that way; else so many that
    little is wasted and there are few groups."""
    windows = {spec.window for spec in specs}
    limited = [window for window in windows if window is not None and window < max_len]
    shared = _shared(specs)
    if len(windows) <= 1 or not limited or shared is None:
        return len(specs)
    kinds = Counter((spec.window, shared.parts_of(spec)) for spec in specs)
    # What a layer holds of a sequence that is sixteen windows long.
    span = {window: min(max_len, 16 * max(limited) if window is None else window) for window in windows}

    def held(size: float) -> float:
        """Of such a sequence: positions times arrays."""
        return sum(math.ceil(count / parts / size) * size * span[window] for (window, parts), count in kinds.items())

    def num_groups(size: int) -> int:
        return sum(-(-count // (size * parts)) for (_, parts), count in kinds.items())

    whole = sum(count / parts * span[window] for (window, parts), count in kinds.items())
    most = max(-(-count // parts) for (_, parts), count in kinds.items())
    sizes = [size for size in range(1, most + 1) if num_groups(size) <= MOST_GROUPS]
    best = min(sizes, key=lambda size: held(size) / whole + GROUP_COST * num_groups(size), default=len(specs))
    if len(_shapes(specs)) > 1 and shared.numbers * held(best) >= max(span.values()) * sum(s.numbers for s in specs):
        return len(specs)
    return best


def _shapes(specs: Sequence[KVSpec]) -> set[KVSpec]:
    """What layers keep, apart from windows."""
    return {dataclasses.replace(spec, window=None) for spec in specs}


def _shared(specs: Sequence[KVSpec]) -> KVSpec | None:
    """What an array keeps that any of these layers may lie in; None where there is none."""
    shapes = _shapes(specs)
    if len(shapes) <= 1:  # none where no layer keeps anything of a position (Mamba)
        return next(iter(shapes), None)
    if any(shape.head_dim != shape.v_head_dim or shape.indexed for shape in shapes):
        return None
    most = max(shapes, key=lambda shape: (shape.numbers, shape.num_kv_heads))
    if any(most.numbers % s.numbers and s.num_kv_heads != most.num_kv_heads for s in shapes):
        return None
    kinds = sorted({most.kind_of(shape) for shape in shapes}, key=lambda kind: (kind.num_kv_heads, kind.head_dim))
    return dataclasses.replace(most, kinds=tuple(kinds)) if len(kinds) > 1 else most
