"""What the host asks of the devices, one command a program call, as plain arrays.

The runner makes them from plans; the executor of every process carries out the same ones in the same order. With several
processes the first sends them to the others (`serving/processes`). Where the mesh holds several replicas, arrays are theirs
laid end to end along the first axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np

from serving.engine.requests.buckets import Bucket
from serving.engine.requests.moves import PageMove, StateMove


@dataclasses.dataclass(frozen=True, slots=True)
class Forward:
    """Computes a step's positions. `packed`: int32, `packing.forward_layout(bucket)`."""

    bucket: Bucket
    packed: np.ndarray
    adapted: bool = False  # somebody in it has an adapter
    drafted: bool = False  # it verifies what the last `Draft` guessed


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """Samples the rows of the last `Forward`.

    Attributes:
        rows: S, of the program.
        packed: int32, `packing.sample_layout(rows)`.
        mask_SW: int32 [S, ceil(V / 32)], or None where no row is constrained.
        drafted: of a step that verifies what the last `Draft` guessed, its bucket.
        adapted: a row has an adapter that changes logits.
    """

    rows: int
    packed: np.ndarray
    mask_SW: np.ndarray | None = None
    drafted: Bucket | None = None
    adapted: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Draft:
    """Has the draft model guess for the rows of a step with drafts, whose `Forward` comes next.

    Attributes:
        bucket: the step's.
        forward, sample: int32, packed as `DraftModel.layouts` says.
        wanted: int32 [B], guesses of each row.
    """

    bucket: Bucket
    forward: np.ndarray
    sample: np.ndarray
    wanted: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class Encode:
    """Puts the embeddings of images (or sounds), one of each replica, into the store.

    Attributes:
        bucket: P, of the program.
        patches: float32 [P, X].
        packed: int32, `packing.MediaShape.layout(P)`.
        sound: they are sounds, of a model that also sees.
    """

    bucket: int
    patches: np.ndarray
    packed: np.ndarray
    sound: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class CatchUp:
    """Has the draft model compute pieces of sequences that were computed without it. `packed`: as in Forward."""

    bucket: Bucket
    packed: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeLoop:
    """Up to `steps` decode steps at once. `forward` and `sample`: int32, packed as in Forward and Sample."""

    bucket: Bucket
    forward: np.ndarray
    sample: np.ndarray
    steps: int


@dataclasses.dataclass(frozen=True, slots=True)
class LoadSlot:
    """Writes one slot's rows of the device state; see `state.slot_rows`. `slot`: among its replica's."""

    replica: int
    slot: int
    seen_V: np.ndarray
    bias_ids: np.ndarray
    bias_values: np.ndarray
    banned_ids: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class Pool:
    """Pools hidden states of the last `Forward`, whose tokens were T. `weights_RT`: float32."""

    weights_RT: np.ndarray

    @property
    def tokens(self) -> int:
        return self.weights_RT.shape[1]


@dataclasses.dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Scores rows of the last `Forward`, which had `tokens`, against target ids. Both int32 [PROMPT_LOGPROB_ROWS] a replica; so
    are `adapters`, the rows' slots, where an adapter changes logits."""

    tokens: int
    rows: np.ndarray
    targets: np.ndarray
    adapters: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Writes an adapter's matrices into a slot. `packed`: float32, `models.adapters.attach.Room.pack`."""

    slot: int
    packed: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class PageMoves:
    """Pages to copy, in one direction.

    Attributes:
        replicas, pages: int32 [N], whose pool and which page of it.
        keys: N, under which each is found elsewhere.
    """

    replicas: np.ndarray
    pages: np.ndarray
    keys: tuple[bytes, ...]

    @classmethod
    def of(cls, moves: Sequence[PageMove]) -> Self:
        """Of at least one move."""
        replicas, pages, keys = zip(*moves, strict=True)
        return cls(np.array(replicas, np.int32), np.array(pages, np.int32), keys)


class PagesOut(PageMoves):
    """Copies pages to host memory; every process those parts that its devices hold."""


class PagesIn(PageMoves):
    """Copies pages back from host memory; every process those parts that its devices hold."""


@dataclasses.dataclass(frozen=True, slots=True)
class PagesDropped:
    """Host memory may forget pages. `replicas`: int32 [N]; `keys`: N."""

    replicas: np.ndarray
    keys: tuple[bytes, ...]

    @classmethod
    def of(cls, moves: Sequence[tuple[int, bytes]]) -> PagesDropped:
        return cls(np.array([replica for replica, _ in moves], np.int32), tuple(key for _, key in moves))


@dataclasses.dataclass(frozen=True, slots=True)
class StateMoves:
    """States of recurrent layers to copy.

    Attributes:
        replicas, slots, rows: int32 [N], whose, which of its slots, and which of its snapshots; -1 where none has a part.
    """

    replicas: np.ndarray
    slots: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, moves: Sequence[StateMove]) -> Self:
        """Of at least one move."""
        return cls(*np.array(moves, np.int32).T)


class ClearStates(StateMoves):
    """Makes slots' states those before the first token."""


class LoadStates(StateMoves):
    """Copies snapshots to slots."""


class SaveStates(StateMoves):
    """Copies slots' states, behind everything that was computed before this command, to snapshots."""


PagesMoved = PagesOut | PagesIn | PagesDropped
StatesMoved = ClearStates | LoadStates | SaveStates
Command = (
    Forward
    | Sample
    | Draft
    | CatchUp
    | Encode
    | DecodeLoop
    | LoadSlot
    | LoadAdapter
    | Pool
    | PromptLogprobs
    | PagesMoved
    | StatesMoved
)
