"""The shapes that programs are compiled for. Data: a step is padded up to the smallest bucket that holds it."""

from __future__ import annotations

import dataclasses
import functools

from serving.engine.requests.chunks import CHUNK_ALIGN

MAX_CHUNK_ROWS = 16
"""Prompts that may have a piece in one step."""

STEP_OVERHEAD = 20
"""What a step costs beside its rows, in tokens: 7 ms of 0.34 ms on 2 CPU cores; about that of an accelerator's dispatch."""

CPU_RIDGE, ACCELERATOR_RIDGE = 16, 256
"""Rows below which a matmul is bound by reading its weights, so that a step of fewer rows takes no less time."""

VERIFIED_RIDGES = 4
"""Places that a step with drafts may have, in ridges: beyond that drafts pay for nobody, and their programs were for nothing."""


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """One `forward` program: `decode` rows of `queries` places each, then `chunk` tokens of up to `rows` prompts."""

    decode: int
    chunk: int
    rows: int
    queries: int = 1

    @property
    def decode_tokens(self) -> int:
        """Places of the decode rows; chunk tokens come behind them."""
        return self.decode * self.queries

    @property
    def tokens(self) -> int:
        """T, rows of every matmul."""
        return self.decode_tokens + self.chunk

    @property
    def samples(self) -> int:
        """S, rows of the `sample` program that follows: every place of a decode row and every prompt may sample.

        Rounded up so that buckets share programs: a `sample` takes a second to compile and next to nothing a spare row.
        """
        if self.queries > 1 and not self.chunk:
            return max(4, 1 << (self.decode_tokens - 1).bit_length())
        if not self.chunk:
            return max(self.decode_tokens, 4)
        return self.decode_tokens + (MAX_CHUNK_ROWS if self.decode else self.rows)

    def __str__(self) -> str:
        decode = f"decode {self.decode}" + (f"x{self.queries}" if self.queries > 1 else "")
        return f"{decode} + chunk {self.chunk}x{self.rows}" if self.chunk else decode


@dataclasses.dataclass(frozen=True)
class BucketTable:
    """Every bucket of a server, smallest first."""

    buckets: tuple[Bucket, ...]
    ridge: int = CPU_RIDGE

    @classmethod
    def make(
        cls,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        ridge: int = CPU_RIDGE,
        draft_tokens: int = 0,
        draft_places: int = 0,
    ) -> BucketTable:
        """Decode buckets double (each wastes less than half its rows); chunk buckets quadruple, because a chunk's padding
        costs compute once a prompt, not every step; mixed steps pad decode to the full width.

        Args:
            draft_tokens: drafts of a decode row at most. Steps with drafts have no chunks.
            draft_places: places that a step with drafts has at most.
        """
        decodes = _doubling(1, max_num_seqs)
        chunks = _quadrupling(4 * CHUNK_ALIGN, align_up(max_num_batched_tokens, CHUNK_ALIGN))
        buckets = {Bucket(b, 0, 0) for b in decodes}
        for chunk in chunks:
            rows = min(chunk // CHUNK_ALIGN, MAX_CHUNK_ROWS, max_num_seqs)
            buckets |= {Bucket(0, chunk, rows), Bucket(max_num_seqs, chunk, rows)}
        for queries in _halving(draft_tokens):
            buckets |= {Bucket(b, 0, 0, queries) for b in decodes if b == 1 or b * queries <= draft_places}
        return cls(tuple(sorted(buckets, key=lambda b: (b.tokens, b.decode))), ridge)

    def find(self, decode: int, chunk: int, rows: int, queries: int = 1) -> Bucket:
        """The cheapest bucket for a step of these sizes.

        Args:
            queries: places that a decode row needs.
        Raises:
            ValueError: nothing is large enough: the scheduler went over its limits.
        """
        for bucket in self.buckets:
            fits = (
                bucket.decode >= decode and bucket.chunk >= chunk and bucket.rows >= rows and bucket.queries >= queries
            )
            if fits and (chunk > 0) == (bucket.chunk > 0) and not (decode == 0 and bucket.decode and chunk):
                return bucket
        raise ValueError(
            f"no bucket holds {decode} decode rows of {queries} and {chunk} chunk tokens of {rows} prompts"
        )

    def chunk_tokens(self, wanted: int, decode: int) -> int:
        """How many of `wanted` chunk tokens (alignment included, at most max_chunk) to take into a step of `decode` rows:
        all of them, or as many as fill a smaller bucket, where that and the steps for the rest cost less than the padding.

        300 tokens, say, are 256 and 44 in two steps and not one of 1,024. That matters most for a full server: as requests
        end one by one it computes 50 to 400 prompt tokens beside every decode step.
        """
        return min(wanted, self._chunk_plans[decode > 0][-(-wanted // CHUNK_ALIGN)])

    @functools.cached_property
    def _chunk_plans(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Without and with decode rows: for each number of aligned blocks that wait, the capacity of the first bucket on the
        cheapest way through them."""
        return self._chunk_plan(False), self._chunk_plan(True)

    def _chunk_plan(self, mixed: bool) -> tuple[int, ...]:
        cost_of: dict[int, float] = {}
        for bucket in self.buckets:
            if bucket.chunk and (bucket.decode > 0) == mixed:
                cost_of[bucket.chunk] = max(bucket.tokens, self.ridge) + STEP_OVERHEAD
        cheapest, first = [0.0], [0]
        for blocks in range(1, max(cost_of, default=0) // CHUNK_ALIGN + 1):
            ways = [(c + cheapest[max(0, blocks - size // CHUNK_ALIGN)], -size) for size, c in cost_of.items()]
            cost, size = min(ways)
            cheapest.append(cost)
            first.append(-size)
        return tuple(first)

    def queries(self, decode: int) -> tuple[int, ...]:
        """How many places so many decode rows may have in a step, fewest first; 1 among them."""
        return tuple(sorted({b.queries for b in self.buckets if b.decode >= decode and not b.chunk}))

    @property
    def max_chunk(self) -> int:
        return max(b.chunk for b in self.buckets)

    @property
    def max_rows(self) -> int:
        return max(b.rows for b in self.buckets)

    @property
    def sample_sizes(self) -> tuple[int, ...]:
        return tuple(sorted({b.samples for b in self.buckets}))

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Token counts of forward programs that hold chunks (each may be asked for prompt logprobs)."""
        return tuple(sorted({b.tokens for b in self.buckets if b.chunk}))


def align_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _doubling(start: int, end: int) -> list[int]:
    sizes: list[int] = []
    size = start
    while size < end:
        sizes.append(size)
        size *= 2
    return [*sizes, end]


def _halving(drafts: int) -> set[int]:
    """Places of rows with up to `drafts` drafts: all of them, or half as many, as long as these are two or more."""
    sizes: set[int] = set()
    while drafts > 0:
        sizes.add(drafts + 1)
        drafts = drafts // 2 if drafts > 3 else 0
    return sizes


def _quadrupling(start: int, end: int) -> list[int]:
    sizes: list[int] = []
    size = start
    while size < end:
        sizes.append(size)
        size *= 4
    return [*sizes, end]
