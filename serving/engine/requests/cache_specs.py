"""What the layers of a model keep of a sequence, as the scheduler sees it: one spec a group of layers that are kept together.

Paged groups keep something of every position (K and V), in pages of a pool. A recurrent group keeps one state a running
request, whatever its length, in the request's slot; to be found again by others, states are copied to *snapshots* at chosen
positions. Everything else about groups, which layers they are and where their arrays lie, is the device's.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int8": 1}


@dataclasses.dataclass(frozen=True)
class PagedSpec:
    """Layers that keep K and V of each position.

    Attributes:
        window: how many positions back a token attends, itself included; None for all.
    """

    window: int | None = None


@dataclasses.dataclass(frozen=True)
class StateArray:
    """One array of a recurrent state: a convolution's last inputs, or a matrix.

    Attributes:
        name: unique among those of a model.
        shape: of one slot.
        axes: the mesh axis that splits each dimension; () for none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    axes: tuple[str | None, ...] = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class RecurrentSpec:
    """All layers that keep a state.

    Attributes:
        arrays: what a slot holds, and a snapshot as well.
        interval: tokens from one snapshot of a long sequence to the next; rounded up to whole pages.
        tail: while a completion grows, its newest snapshot is at most so many tokens old; rounded up to whole pages. That is
            what the next turn of a conversation begins with.
        worth: tokens that a snapshot in a prompt must save whoever finds it, to be worth ending a piece of the prompt there.
    """

    arrays: tuple[StateArray, ...]
    interval: int = 1024
    tail: int = 16
    worth: int = 128

    @property
    def state_bytes(self) -> int:
        """Of one slot, or one snapshot."""
        return sum(array.nbytes for array in self.arrays)


CacheSpec = PagedSpec | RecurrentSpec


def paged(*windows: int | None) -> tuple[PagedSpec, ...]:
    """Paged groups with these windows."""
    return tuple(map(PagedSpec, windows))


def recurrent_of(model: Any) -> RecurrentSpec | None:
    """What a model's recurrent layers keep of a running request (`models.api.CausalLM.state_specs`; an installed package's may
    say nothing); None where there are none."""
    specs = model.state_specs() if hasattr(model, "state_specs") else ()
    arrays = tuple(StateArray(spec.name, spec.shape, spec.dtype, spec.axes) for spec in specs)
    return RecurrentSpec(arrays) if arrays else None
