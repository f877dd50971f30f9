"""The arrays behind a recurrent group: a state of every slot, and the snapshots that states are copied to and from.

Row `slots` of the states is the dummy that padding rows use. Both kinds of array lie end to end by replica, as pages do.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ops import native
from ops.paged_attention.pages import DATA_AXIS
from ops.recurrent import States
from serving.engine.device.programs.compiling import Program
from serving.engine.device.programs.keys import ProgramKey
from serving.engine.device.programs.placement import of_one, place
from serving.engine.device.programs.trial import Trial
from serving.engine.device.stores.parts import part_of, slices, whole
from serving.engine.requests.buckets import Bucket
from serving.engine.requests.cache_specs import RecurrentSpec
from serving.engine.requests.commands import ClearStates, LoadStates, SaveStates

SAVE, LOAD, CLEAR = ProgramKey("save_states"), ProgramKey("load_states"), ProgramKey("clear_states")
READ, WRITE = ProgramKey("read_snapshot"), ProgramKey("write_snapshot")

PARCEL = 8
"""States of each replica that a copy program moves at once."""


def save_states(snapshots: States, states: States, slots: jax.Array, rows: jax.Array) -> States:
    """Copies the states of `slots` int32 [PARCEL] to `rows` int32 [PARCEL]; a row out of range is dropped."""
    return jax.tree.map(lambda s, a: s.at[rows].set(a[slots], mode="drop"), snapshots, states)


def load_states(states: States, snapshots: States, slots: jax.Array, rows: jax.Array) -> States:
    """Copies the snapshots in `rows` int32 [PARCEL] to `slots` int32 [PARCEL]; a slot out of range is dropped."""
    return jax.tree.map(lambda a, s: a.at[slots].set(s[rows], mode="drop"), states, snapshots)


def clear_states(states: States, slots: jax.Array) -> States:
    """Makes the states of `slots` int32 [PARCEL] those before the first token; a slot out of range is dropped."""
    return jax.tree.map(lambda a: a.at[slots].set(jnp.zeros((), a.dtype), mode="drop"), states)


def read_snapshot(snapshots: States, row: jax.Array) -> States:
    """The snapshot in row int32 [1], every array [1, ...]."""
    return jax.tree.map(lambda s: s[row], snapshots)


def write_snapshot(snapshots: States, row: jax.Array, content: States) -> States:
    """Puts a snapshot into row int32 [1]; a row out of range is dropped."""
    return jax.tree.map(lambda s, c: s.at[row].set(c, mode="drop"), snapshots, content)


def abstract_states(spec: RecurrentSpec, rows: int, mesh: Mesh | None, replicas: int) -> States:
    """Shapes and, on a mesh, places of so many rows a replica; nothing is allocated."""
    lead = DATA_AXIS if replicas > 1 else None
    arrays = {a.name: jax.ShapeDtypeStruct((replicas * rows, *a.shape), jnp.dtype(a.dtype)) for a in spec.arrays}
    return States(arrays, () if mesh is None else tuple((a.name, PartitionSpec(lead, *a.axes)) for a in spec.arrays))


def _cut(row: np.ndarray, index: Any) -> np.ndarray:
    """One device's part of a row, as the only one of its replica: [1, ...]."""
    return np.ascontiguousarray(row[slices(part_of(index))])[None]


class StateStore:
    """States and snapshots of one process.

    Args:
        spec: what a state holds.
        slots, rows: of each replica: running requests, and snapshots.

    Attributes:
        states: of replicas * (slots + 1). A step's program takes them over and gives new ones.
        snapshots: of replicas * max(rows, 1).
    """

    def __init__(self, spec: RecurrentSpec, slots: int, rows: int, mesh: Mesh | None = None, replicas: int = 1) -> None:
        self._slots, self._rows, self._replicas, self._mesh = slots, max(rows, 1), replicas, mesh
        self._spec = spec
        self._programs: dict[ProgramKey, Any] = {}
        self.states = self.snapshots = States({})
        self._held: tuple[Bucket, Any, Trial] | None = None  # a step with drafts between its halves
        self.reset()

    def reset(self) -> None:
        """Empty states, in place of those there are or a failed program took over."""

        def zeros(rows: int) -> States:
            abstract = abstract_states(self._spec, rows, self._mesh, self._replicas)
            spread = dict(abstract.placements)
            # Native zeros lie in huge pages where there are some: states are read and written whole at every step.
            lazy = self._mesh is None and jax.default_backend() == "cpu" and native.available()
            fresh = native.zeros if lazy else jnp.zeros
            arrays = {
                name: place(self._mesh, fresh(a.shape, a.dtype), spread.get(name, PartitionSpec()))
                for name, a in abstract.arrays.items()
            }
            return States(arrays, abstract.placements)

        self.states, self.snapshots = zeros(self._slots + 1), zeros(self._rows)
        self._held = None

    def programs(self, travel: bool = False) -> list[Program]:
        """What copies states, for one replica.

        Args:
            travel: to the host and back as well, for other engines.
        """
        states, snapshots = jax.tree.map(lambda a: of_one(self._mesh, a), (self.states, self.snapshots))
        ids = jax.ShapeDtypeStruct((PARCEL,), jnp.int32)
        one = jax.ShapeDtypeStruct((1,), jnp.int32)
        content = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype, sharding=a.sharding), snapshots
        )
        more = [
            Program(READ, read_snapshot, (snapshots, one), (), ()),
            Program(WRITE, write_snapshot, (snapshots, one, content), (0,), ()),
        ]
        return (more if travel else []) + [
            Program(SAVE, save_states, (snapshots, states, ids, ids), (0,), (), True),
            Program(LOAD, load_states, (states, snapshots, ids, ids), (0,), (), True),
            Program(CLEAR, clear_states, (states, ids), (0,), (), True),
        ]

    def bind(self, programs: dict[ProgramKey, Any]) -> None:
        """Takes the compiled programs."""
        self._programs = programs

    def hold(self, bucket: Bucket, packed: Any, trial: Trial) -> None:
        """A step with drafts has left states as they are; `commit` brings them on when it has been sampled."""
        self._held = bucket, packed, trial

    def commit(self, ends: Any) -> None:
        """A step has been sampled; `ends` are DeviceState.ends behind it."""
        if self._held is not None:
            (bucket, packed, trial), self._held = self._held, None
            program = self._programs[ProgramKey("commit_states", bucket)]
            self.states = program(self.states, ends, packed, trial)

    def carry_out(self, command: SaveStates | LoadStates | ClearStates) -> None:
        """Starts the copies of a command."""
        of: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for replica, slot, row in zip(
            command.replicas.tolist(), command.slots.tolist(), command.rows.tolist(), strict=True
        ):
            of[replica].append((slot, row))
        for start in range(0, max(map(len, of.values()), default=0), PARCEL):
            # Padding reads the first of its kind and writes out of range.
            saving = isinstance(command, SaveStates)
            slots = np.full((self._replicas, PARCEL), 0 if saving else self._slots + 1, np.int32)
            rows = np.full((self._replicas, PARCEL), self._rows if saving else 0, np.int32)
            for replica, moves in of.items():
                for i, (slot, row) in enumerate(moves[start : start + PARCEL]):
                    slots[replica, i], rows[replica, i] = slot, row
            slots, rows = slots.reshape(-1), rows.reshape(-1)
            match command:
                case SaveStates():
                    self.snapshots = self._programs[SAVE](self.snapshots, self.states, slots, rows)
                case LoadStates():
                    self.states = self._programs[LOAD](self.states, self.snapshots, slots, rows)
                case ClearStates():
                    self.states = self._programs[CLEAR](self.states, slots)

    # ---- snapshots that travel between engines ----

    @property
    def arrays(self) -> list[jax.Array]:
        """The snapshots' arrays, in the order in which a snapshot travels."""
        return jax.tree.leaves(self.snapshots)

    def lend(self, replica: int, row: int) -> Callable[[], list[np.ndarray]]:
        """Starts copying a snapshot out. What it gives waits for the copy, on whatever thread: every array's row, whole."""
        found = jax.tree.leaves(self._programs[READ](self.snapshots, self._only(replica, row)))
        for array in found:
            array.copy_to_host_async()

        def take() -> list[np.ndarray]:
            rows: list[np.ndarray] = []
            for array in found:
                here = [shard for shard in array.addressable_shards if (shard.index[0].start or 0) == replica]
                rows.append(whole({part_of(shard.index): np.asarray(shard.data)[0] for shard in here}, array.shape[1:]))
            return rows

        return take

    def write(self, replica: int, row: int, rows: list[np.ndarray]) -> None:
        """Puts a snapshot into a row."""
        arrays, treedef = jax.tree.flatten(self.snapshots)
        content = [
            jax.make_array_from_callback(
                (self._replicas, *like.shape[1:]),
                like.sharding,
                functools.partial(_cut, whole_row),
            )
            for like, whole_row in zip(arrays, rows, strict=True)
        ]
        taken = jax.tree.unflatten(treedef, content)
        self.snapshots = self._programs[WRITE](self.snapshots, self._only(replica, row), taken)

    def _only(self, replica: int, row: int) -> np.ndarray:
        """int32 [replicas]: the row of one replica, and none of the others."""
        rows = np.full(self._replicas, max(self._rows, 1), np.int32)
        rows[replica] = row
        return rows
