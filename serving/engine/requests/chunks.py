"""The chunk part of a step: pieces of prompts, as long as budget, aligned capacity and rows allow."""

from __future__ import annotations

from serving.engine.requests.plan import CHUNK_ALIGN, Chunk, align
from serving.engine.requests.request import Request


class ChunkBuilder:
    """Fills the chunk part of a step.

    Args:
        budget: tokens left of the step's budget.
        room: capacity in tokens, alignment included.
        rows: prompts that may have a piece.
        background: to how many tokens, alignment included, pieces of background requests may lengthen the chunk part.
    """

    def __init__(self, budget: int, room: int, rows: int, background: int) -> None:
        self.budget = budget
        self.capacity = room
        self.background = background
        self.rows = rows
        self.tokens = 0  # taken so far, alignment included
        self.chunks: list[Chunk] = []

    def has_room(self, background: bool = False) -> bool:
        """Whether a further prompt gets a piece."""
        limit = min(self.capacity, self.background) if background else self.capacity
        return self.budget > 0 and self.rows > 0 and limit - self.tokens >= CHUNK_ALIGN

    def room_for(self, request: Request, background: bool = False) -> int:
        """Tokens of the longest piece that the request could get; 0 for none."""
        if not self.has_room(background):
            return 0
        limit = min(self.capacity, self.background) if background else self.capacity
        return min(request.num_uncomputed, self.budget, limit - self.tokens)

    def add(self, request: Request, length: int) -> None:
        """Gives the request a piece no longer than `room_for` says."""
        samples = length == request.num_uncomputed and not request.spec.pooling
        self.chunks.append(Chunk(request, request.num_computed, length, samples, self.tokens))
        self.budget -= length
        self.tokens += align(length)
        self.rows -= 1

    def shorten(self, tokens: int) -> None:
        """Takes pieces back, the last ones first, until the chunk part is no longer than `tokens` (a multiple of the
        alignment)."""
        while self.tokens > tokens:
            last = self.chunks.pop()
            self.tokens -= align(last.length)
            self.budget += last.length
            self.rows += 1
            if self.tokens < tokens:
                self.add(last.request, min(last.length, tokens - self.tokens))
