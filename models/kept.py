"""What the layers of a model keep of its sequences, handed to each layer as its own: pages, states, or both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from models.api import KVCache, StateSpec
from ops.paged_attention import KVPages, array_pages, layer_pages
from ops.paged_attention.batch import AttentionBatch, KVSpec
from ops.recurrent.states import States


@dataclasses.dataclass(frozen=True)
class Kept:
    """Of each layer, what it keeps. Hashable and static.

    Attributes:
        specs: what is kept of each position: one a layer with pages of its own.
        pages: of each layer, which of `specs` its pages are; None for a layer without. Layers may read others' pages.
        states: of each layer, its arrays.
    """

    specs: tuple[KVSpec, ...]
    pages: tuple[int | None, ...]
    states: tuple[tuple[StateSpec, ...], ...]

    @classmethod
    def of(cls, layers: Sequence[Any]) -> Kept:
        """From what layers, or their `attn`, say of themselves, all of it optional: `kv_spec`, `state_specs`, and `reads_of`, the
        index of the layer whose pages a layer reads that has none of its own."""
        specs: list[KVSpec] = []
        pages: list[int | None] = []
        for layer in layers:
            spec, other = _said(layer, "kv_spec"), _said(layer, "reads_of")
            if spec is not None:
                specs.append(spec)
            pages.append(len(specs) - 1 if spec is not None else None if other is None else pages[other])
        return cls(tuple(specs), tuple(pages), tuple(tuple(_said(layer, "state_specs") or ()) for layer in layers))

    @property
    def last(self) -> int:
        """The last layer that keeps anything of its own: what leaves it, and those behind it, is for hidden states alone."""
        own = [self.pages.index(place) for place in range(len(self.specs))]
        return max([*own, *(layer for layer, specs in enumerate(self.states) if specs)], default=0)

    @property
    def state_specs(self) -> tuple[StateSpec, ...]:
        """All arrays of states under names that are unique in the model."""
        return tuple(
            dataclasses.replace(spec, name=f"{layer}.{spec.name}")
            for layer, specs in enumerate(self.states)
            for spec in specs
        )


class Cache:
    """A step's cache, taken apart by layers and put together again.

    What a layer is given: its pages; a dictionary of its states by their own names; or (pages, states) where it has both.
    """

    def __init__(self, kept: Kept, attention: AttentionBatch, cache: KVCache) -> None:
        self._kept, self._attention = kept, attention
        self._states: States | None = cache[-1] if cache and isinstance(cache[-1], States) else None
        self._pages = list(cache if self._states is None else cache[:-1])
        self._arrays: dict[str, jax.Array] = {} if self._states is None else dict(self._states.arrays)

    def of(self, layer: int) -> tuple[int, Any]:
        """(its attention group, what it keeps)."""
        place = self._kept.pages[layer]
        names = [spec.name for spec in self._kept.states[layer]]
        states = {name: self._arrays[f"{layer}.{name}"] for name in names}
        if place is None:
            return 0, states
        group, array, part = self._attention.place(place)
        pages = self._pages[array]
        if isinstance(pages, KVPages):  # without any, where whole sequences are given
            pages = layer_pages(pages, self._kept.specs[place], part)
        return group, (pages, states) if states else pages

    def put(self, layer: int, kept: Any) -> None:
        """What the layer has made of it."""
        place, states = self._kept.pages[layer], self._kept.states[layer]
        pages, arrays = kept if place is not None and states else (kept, kept)
        if place is not None:
            self._pages[self._attention.place(place)[1]] = array_pages(pages) if isinstance(pages, KVPages) else pages
        for spec in states:
            self._arrays[f"{layer}.{spec.name}"] = arrays[spec.name]

    def whole(self) -> KVCache:
        """As it came."""
        pages = tuple(self._pages)
        return pages if self._states is None else (*pages, dataclasses.replace(self._states, arrays=self._arrays))


def _said(layer: Any, name: str) -> Any:
    own = getattr(layer, name, None)
    return getattr(getattr(layer, "attn", None), name, None) if own is None else own
