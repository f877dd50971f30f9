"""Steps that recurrent layers are tested and timed on."""

from __future__ import annotations

import dataclasses

import numpy as np

from ops.paged_attention.batch import Q_BLOCK
from ops.recurrent.batch import RecurrentBatch


@dataclasses.dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
        decode: (tokens before, new tokens) of each decode row; 0 new ones is a padded row.
        queries: Q, of which `replayed` repeat the step before.
        accepted: of those, for each decode row.
        chunks: (tokens before, tokens in it) of each piece; a second number of 0 is a padded one.
        pad_blocks: padded blocks behind the chunk part.
    """

    decode: tuple[tuple[int, int], ...] = ()
    queries: int = 1
    replayed: int = 0
    accepted: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()
    pad_blocks: int = 0

    @property
    def num_slots(self) -> int:
        """Slots of the states, the dummy last."""
        return len(self.decode) + len(self.chunks) + 2


TEST_CASES: dict[str, Case] = {
    "decode": Case(decode=((1, 1), (7, 1), (0, 1))),
    "decode_padded": Case(decode=((0, 0), (5, 1), (0, 0))),
    "decode_several": Case(decode=((3, 4), (9, 2), (4, 0)), queries=4),
    "verify": Case(decode=((3, 3), (9, 2), (4, 1), (2, 3)), queries=6, replayed=3, accepted=(0, 3, 2, 1)),
    "chunk_begins": Case(chunks=((0, 40),)),
    "chunk_goes_on": Case(chunks=((37, 50),)),
    "chunk_of_one": Case(chunks=((5, 1), (0, 1))),
    "chunk_rows": Case(chunks=((0, 5), (100, 17), (0, 0), (31, 16)), pad_blocks=2),
    "chunk_long": Case(chunks=((0, 130), (7, 70))),
    "mixed": Case(decode=((5, 1), (0, 0), (70, 1)), chunks=((0, 18), (48, 2), (0, 0)), pad_blocks=1),
}

BENCH_CASES: dict[str, Case] = {
    "decode 1": Case(decode=((100, 1),)),
    "decode 16": Case(decode=((100, 1),) * 16),
    "decode 64": Case(decode=((100, 1),) * 64),
    "prefill 1 x 1024": Case(chunks=((0, 1024),)),
    "prefill 8 x 128": Case(chunks=((0, 128),) * 8),
}


def make_batch(case: Case, seed: int = 0) -> RecurrentBatch:
    """The batch of a case as numpy arrays; slots are scattered."""
    rng = np.random.default_rng(seed)
    dummy = case.num_slots - 1
    slots = iter(rng.permutation(dummy))
    starts = np.cumsum([0, *(-(-new // Q_BLOCK) * Q_BLOCK for _, new in case.chunks)])
    decode = len(case.decode) * case.queries

    def array(values: object) -> np.ndarray:
        return np.asarray(values, np.int32).reshape(-1)

    return RecurrentBatch(
        decode_slot_B=array([next(slots) if new else dummy for _, new in case.decode]),  # pyright: ignore[reportArgumentType]
        decode_start_B=array([before for before, _ in case.decode]),  # pyright: ignore[reportArgumentType]
        decode_count_B=array([new for _, new in case.decode]),  # pyright: ignore[reportArgumentType]
        chunk_slot_R=array([next(slots) if new else dummy for _, new in case.chunks]),  # pyright: ignore[reportArgumentType]
        chunk_first_R=array(starts[:-1]),  # pyright: ignore[reportArgumentType]
        chunk_start_R=array([before for before, _ in case.chunks]),  # pyright: ignore[reportArgumentType]
        chunk_qlen_R=array([new for _, new in case.chunks]),  # pyright: ignore[reportArgumentType]
        num_tokens=decode + int(starts[-1]) + case.pad_blocks * Q_BLOCK,
        queries=case.queries,
        replayed=case.replayed,
        accepted_B=array(case.accepted) if case.accepted else None,  # pyright: ignore[reportArgumentType]
    )
