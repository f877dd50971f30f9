"""The chunk part of a step: pieces of prompts, as long as budget, aligned capacity and rows allow."""

from __future__ import annotations

from serving.engine.plan import Chunk
from serving.engine.request import Request

CHUNK_ALIGN = 16
"""Pieces of prompts start at multiples of this in the chunk part of a step (ops' Q_BLOCK)."""


def align(tokens: int) -> int:
    """Chunk positions that a piece of `tokens` takes up."""
    return -(-tokens // CHUNK_ALIGN) * CHUNK_ALIGN


class ChunkBuilder:
    """Fills the chunk part of a step.

    Args:
        budget: tokens left of the step's budget.
        room: capacity in tokens, alignment included.
        rows: prompts that may have a piece.
    """

    def __init__(self, budget: int, room: int, rows: int) -> None:
        self.budget = budget
        self.room = room
        self.rows = rows
        self.chunks: list[Chunk] = []

    @property
    def has_room(self) -> bool:
        return self.budget > 0 and self.room >= CHUNK_ALIGN and self.rows > 0

    def add(self, request: Request) -> None:
        """Gives the request as long a piece as fits."""
        if not self.has_room:
            return
        length = min(request.num_uncomputed, self.budget, self.room)
        samples = length == request.num_uncomputed and not request.spec.pooling
        self.chunks.append(Chunk(request, request.num_computed, length, samples))
        self.budget -= length
        self.room -= align(length)
        self.rows -= 1
