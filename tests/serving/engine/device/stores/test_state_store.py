"""States of slots and their snapshots, copied by command."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from serving.engine.device.stores.state_store import PARCEL, StateStore
from serving.engine.requests.cache_specs import RecurrentSpec, StateArray
from serving.engine.requests.commands import ClearStates, LoadStates, SaveStates
from serving.engine.requests.moves import StateMove

SPEC = RecurrentSpec((StateArray("conv", (2, 3)), StateArray("matrix", (2, 4, 4), "bfloat16")))
SLOTS, ROWS = PARCEL + 3, PARCEL + 2


def test_states_go_where_they_are_sent_and_nowhere_else():
    store = StateStore(SPEC, SLOTS, ROWS)
    store.bind({p.key: jax.jit(p.fn, donate_argnums=p.donate) for p in store.programs()})
    arrays = store.states.arrays
    assert {name: a.shape for name, a in arrays.items()} == {
        "conv": (SLOTS + 1, 2, 3), "matrix": (SLOTS + 1, 2, 4, 4),
    }  # fmt: skip
    assert sum(a.nbytes for a in arrays.values()) == (SLOTS + 1) * SPEC.state_bytes
    wanted = {name: np.arange(a.size).reshape(a.shape) % 97 for name, a in arrays.items()}
    filled = {name: jax.numpy.asarray(wanted[name], a.dtype) for name, a in arrays.items()}
    store.states = dataclasses.replace(store.states, arrays=filled)
    kept = {name: np.zeros((ROWS, *a.shape[1:])) for name, a in arrays.items()}

    def check():
        for name in wanted:
            np.testing.assert_array_equal(np.asarray(store.states.arrays[name], np.float32), wanted[name])
            np.testing.assert_array_equal(np.asarray(store.snapshots.arrays[name], np.float32), kept[name])

    # More than one program moves, in an order of their own.
    saved = [StateMove(0, slot, (3 * slot + 1) % ROWS) for slot in range(ROWS)]
    store.carry_out(SaveStates.of(saved))
    for name in wanted:
        for _, slot, row in saved:
            kept[name][row] = wanted[name][slot]
    check()
    store.carry_out(ClearStates.of([StateMove(0, slot) for slot in (1, 4, 5)]))
    for name in wanted:
        wanted[name][[1, 4, 5]] = 0
    check()
    store.carry_out(LoadStates.of([StateMove(0, 4, 2), StateMove(0, 0, 2), StateMove(0, 9, 7)]))
    for name in wanted:
        wanted[name][[4, 0, 9]] = kept[name][[2, 2, 7]]
    check()
    store.reset()
    assert not any(np.asarray(a, np.float32).any() for a in jax.tree.leaves((store.states, store.snapshots)))
