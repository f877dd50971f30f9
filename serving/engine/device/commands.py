"""What the host asks of the devices, one command a program call, as plain arrays.

The runner makes them from plans; the executor of every process carries out the same ones in the same order. With several
processes the first sends them to the others (`serving/processes`). Where the mesh holds several replicas, arrays are theirs
laid end to end along the first axis.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from serving.engine.requests.buckets import Bucket


@dataclasses.dataclass(frozen=True, slots=True)
class Forward:
    """Computes a step's positions. `packed`: int32, `packing.forward_layout(bucket)`."""

    bucket: Bucket
    packed: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """Samples the rows of the last `Forward`.

    Attributes:
        rows: S, of the program.
        packed: int32, `packing.sample_layout(rows)`.
        mask_SW: int32 [S, ceil(V / 32)], or None where no row is constrained.
    """

    rows: int
    packed: np.ndarray
    mask_SW: np.ndarray | None = None


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
    """Scores rows of the last `Forward`, which had `tokens`, against target ids. Both int32 [PROMPT_LOGPROB_ROWS] a replica."""

    tokens: int
    rows: np.ndarray
    targets: np.ndarray


Command = Forward | Sample | DecodeLoop | LoadSlot | Pool | PromptLogprobs
