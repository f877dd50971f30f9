"""What lies on a device beside programs and their temporaries, and how many sequences the rest holds: as a server decides it
(`serving.engine.device.sizing`), from shapes alone."""

from __future__ import annotations

import dataclasses
from typing import Any

from models.adapters.attach import bytes_of_stacks
from ops.linear.weights.group_pack import Packing
from serving.engine.cache.kv_windows import pages_of
from serving.engine.cache.snapshots import SNAPSHOT_SHARE, budget
from serving.plan.programs import AbstractEngine, abstract_tower, bytes_on_device, weight_leaves


@dataclasses.dataclass(frozen=True)
class Room:
    """What sequences take on one device of a replica, bytes.

    Attributes:
        slots: requests that run at once.
        page: of one page in all arrays, a draft model's part included; 0 where no layer keeps pages.
        state: of one recurrent state; 0 where no layer keeps one.
        windows: of the attention groups.
        page_size: positions of a page.
    """

    slots: int
    page: int
    state: int
    windows: tuple[int | None, ...]
    page_size: int

    @classmethod
    def of(cls, engine: AbstractEngine, draft: AbstractEngine | None = None) -> Room:
        """Of an engine, and of a draft model beside it."""
        sizes = engine.sizes
        page = engine.kv_bytes_a_page + (0 if draft is None else draft.kv_bytes_a_page)
        return cls(sizes.max_num_seqs, page, engine.bytes_a_state, engine.shapes.groups.windows, sizes.page_size)

    @property
    def states(self) -> int:
        """Of the running requests' states, and nobody's."""
        return (self.slots + 1) * self.state

    def within(self, memory: int, max_model_len: int, chunk: int) -> tuple[int, int]:
        """(pages, snapshots) that so many bytes hold beside the running requests' states: none where not even those fit.

        Args:
            max_model_len: of the longest sequences; no more pages than as many of those as run at once take.
            chunk: tokens of a step at most.
        """
        if memory < self.states:
            return 0, 0
        taken, snapshots = 0, 0
        if self.state:
            taken, snapshots = budget(memory, self.state, self.slots, SNAPSHOT_SHARE if self.windows else 1.0)
        if not self.windows:
            return 2, snapshots  # the null page, and one that nothing is in
        most = self.slots * pages_of(max_model_len, self.windows, self.page_size, chunk) + 1
        return min(most, (memory - taken) // self.page), snapshots

    def at_once(self, num_pages: int, tokens: int) -> int:
        """Requests of so many tokens that run at once."""
        if not self.windows:
            return self.slots if num_pages else 0
        return min(self.slots, max(num_pages - 1, 0) // pages_of(tokens, self.windows, self.page_size))


def adapter_bytes(engine: AbstractEngine, slots: int, rank: int, dtype: str) -> int:
    """What room for adapters takes of a device."""
    return bytes_of_stacks(engine.model, slots, rank, engine.mesh, dtype=dtype) if slots else 0


def tower_bytes(
    hf: dict[str, Any], mesh: Any, dtype: str, quantization: str | Packing | None, embeddings_gib: float | None
) -> int:
    """What reading images or hearing takes of a device: the tower's weights, and room for embeddings; 0 where texts alone are
    served (`embeddings_gib` is None) and for models without one."""
    rounded = None if isinstance(quantization, Packing) else quantization  # packed checkpoints have dense towers
    tower = None if embeddings_gib is None else abstract_tower(hf, mesh, dtype, rounded)
    if tower is None or embeddings_gib is None:
        return 0
    weights = sum(bytes_on_device(leaf) for _, _, leaf in weight_leaves(tower))
    return weights + int(embeddings_gib * 2**30)
