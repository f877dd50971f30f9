"""Checkpoints of a run: what is trained and the optimizer's state by Orbax, and beside them which run it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

KEPT = 2


class Checkpoints:
    """The checkpoints in a folder, by their steps; the newest `KEPT` stay.

    Args:
        run: what a run that goes on from one must share, as JSON.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]):
        self._folder, self._run = folder, _plain(run)
        self._manager = ocp.CheckpointManager(
            folder.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
        )

    def save(self, step: int, trained: Any, optimizer: Any) -> None:
        """Writes what was reached behind `step` steps; a checkpoint of that step stays as it is."""
        if step in self._manager.all_steps():
            return
        state = ocp.args.StandardSave({"trained": trained, "optimizer": optimizer})
        self._manager.save(step, args=ocp.args.Composite(state=state, run=ocp.args.JsonSave(self._run)))

    def newest(self) -> int | None:
        """The step of the newest one."""
        return self._manager.latest_step()

    def restore(self, step: int, trained: Any, optimizer: Any) -> tuple[Any, Any]:
        """(what is trained, the optimizer's state), placed as the arguments are.

        Raises:
            ValueError: it is of a run with other settings or data, which are named.
        """
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        differ = [
            f"{name} was {run.get(name)!r} and is {value!r}"
            for name, value in self._run.items()
            if run.get(name) != value
        ]
        if differ:
            raise ValueError(
                f"{self._folder} is of another run: {'; '.join(differ[:3])}. Give the same settings or another --out."
            )
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            {"trained": trained, "optimizer": optimizer},
        )
        state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))["state"]
        return state["trained"], state["optimizer"]

    def close(self) -> None:
        self._manager.close()


def digest(files: Iterable[Path]) -> str:
    """Of the content of files."""
    found = hashlib.blake2b(digest_size=8)
    for path in files:
        content = path.read_bytes()
        found.update(len(content).to_bytes(8, "little") + content)
    return found.hexdigest()


def _plain(value: Any) -> Any:
    """As it is when it comes back from JSON."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
