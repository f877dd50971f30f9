"""Which layers share pages. A page holds a span of one sequence for a *group* of layers that attend alike: all back, or all as
far. So what is behind a window can be given up in the groups that have one, while the others keep theirs.

All groups have the same number of layers, at most, and layer i of each has its part of a page in the same array: there are as
many arrays as a group has layers, any group may take any page, and nothing is divided up beforehand. (Kwon et al. 2023,
arXiv:2309.06180, describe pages; the idea of groups of one size is vLLM's.) A model whose layers are all alike is one group.

Layers whose heads differ in size share arrays that hold the largest: the others fill their rows up with zeros (`attend`
does), where what windows give back outweighs that. Gemma 4 E2B has heads of 256 in 28 layers with windows and of 512 in
seven without.
"""

from __future__ import annotations

import dataclasses
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
        places: (group, array) of each layer; None with a single group, where layer i has array i. Without layers that keep
            pages there is no group.
    """

    windows: tuple[int | None, ...]
    arrays: tuple[KVSpec, ...]
    places: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def of(cls, specs: Sequence[KVSpec], layers_per_page: int | None = None) -> KVGroups:
        """Groups of so many layers, the last ones of a kind smaller where need be; None, or as many as there are, for one group.

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
        open_groups: dict[int | None, tuple[int, int]] = {}  # window -> (its last group, layers in it)
        places = []
        for spec in specs:
            group, taken = open_groups.get(spec.window, (-1, layers_per_page))
            if taken == layers_per_page:
                group, taken = len(windows), 0
                windows.append(spec.window)
            places.append((group, taken))
            open_groups[spec.window] = group, taken + 1
        return cls(tuple(windows), (shared,) * layers_per_page, tuple(places))


def layers_per_page(specs: Sequence[KVSpec], max_len: int) -> int:
    """How many layers a group is to have, for sequences of up to `max_len` tokens: all of them where no window would free
    anything, or where the layers cannot share arrays, or would take more memory that way; else so many that little is wasted and
    there are few groups."""
    counts = Counter(spec.window for spec in specs)
    limited = [window for window in counts if window is not None and window < max_len]
    shared = _shared(specs)
    if len(counts) <= 1 or not limited or shared is None:
        return len(specs)
    # What a layer holds of a sequence that is sixteen windows long.
    span = {window: min(max_len, 16 * max(limited) if window is None else window) for window in counts}
    whole = sum(count * span[window] for window, count in counts.items())

    def cost(size: int) -> float:
        unused = sum(-count % size * span[window] for window, count in counts.items())
        return unused / whole + GROUP_COST * _num_groups(counts, size)

    sizes = range(1, max(counts.values()) + 1)
    best = min((size for size in sizes if _num_groups(counts, size) <= MOST_GROUPS), key=cost, default=len(specs))
    if len(_shapes(specs)) > 1:
        together = _numbers(shared) * sum(-(-count // best) * best * span[window] for window, count in counts.items())
        if together >= max(span.values()) * sum(map(_numbers, specs)):
            return len(specs)
    return best


def _num_groups(counts: Counter[int | None], size: int) -> int:
    return sum(-(-count // size) for count in counts.values())


def _shapes(specs: Sequence[KVSpec]) -> set[KVSpec]:
    """What layers keep, apart from windows."""
    return {dataclasses.replace(spec, window=None) for spec in specs}


def _numbers(spec: KVSpec) -> int:
    """Of a position in one layer."""
    return spec.num_kv_heads * (spec.head_dim + spec.v_head_dim)


def _shared(specs: Sequence[KVSpec]) -> KVSpec | None:
    """What an array keeps that any of these layers may lie in; None where there is none."""
    shapes = _shapes(specs)
    if not shapes:  # no layer keeps anything of a position (Mamba)
        return None
    widest = max(shapes, key=lambda spec: spec.head_dim)
    alike = all(
        spec.num_kv_heads == widest.num_kv_heads and spec.head_dim == spec.v_head_dim and not spec.indexed
        for spec in shapes
    )
    return widest if alike or len(shapes) == 1 else None
