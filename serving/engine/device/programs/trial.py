"""Drafts where layers keep a state: a step that verifies some leaves states as they are, and they are brought on when it has been
sampled, by as many tokens as it gave.

What a layer's recurrence is given at each place is handed from one program to the other; the recurrence alone is run again, no
weight is read twice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models.api import KVCache
from ops.recurrent import Held, RecurrentBatch, States
from serving.engine.device.programs.packing import Layout


@functools.partial(jax.tree_util.register_dataclass, data_fields=["start_B", "held"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Trial:
    """What a step that verifies drafts leaves for `commit`.

    Attributes:
        start_B: int32, the position of each row's first place.
        held: by the names of states.
    """

    start_B: jax.Array
    held: dict[str, Held]


def take_apart(cache: KVCache, start_B: jax.Array) -> tuple[KVCache, Trial]:
    """A tentative step's cache: as it was, and what there is to commit."""
    *pages, states = cache
    held = {name: dataclasses.replace(held, state=None) for name, held in states.arrays.items()}
    arrays = {name: held.state for name, held in states.arrays.items()}
    return (*pages, dataclasses.replace(states, arrays=arrays)), Trial(start_B, held)


def make_commit(layout: Layout) -> Callable[..., Any]:
    """commit(states, ends, flat, trial) -> states.

    Args of `commit`:
        ends: DeviceState.ends behind the step.
    """

    def commit(states: States, ends: tuple[jax.Array, jax.Array], flat: jax.Array, trial: Trial) -> States:
        f = layout.unpack(flat)
        slot_B, qlen_B = f["decode_slot_B"], f["decode_qlen_B"]
        B, D = slot_B.shape[0], f["tokens_T"].shape[0]
        nobody = jnp.zeros(0, jnp.int32)
        batch = RecurrentBatch(
            slot_B,
            trial.start_B,
            jnp.clip(ends[1][slot_B] - trial.start_B, 0, qlen_B),
            nobody,
            nobody,
            nobody,
            nobody,
            num_tokens=D,
            queries=D // B,
        )
        arrays = {name: held.commit(states.arrays[name], batch) for name, held in trial.held.items()}
        return dataclasses.replace(states, arrays=arrays)

    return commit
