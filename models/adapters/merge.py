"""An adapter put into its base for good: the base's tensors, changed.

What cannot be served beside a base can be merged: DoRA (Liu et al. 2024, arXiv:2402.09353), whose magnitudes scale the base's own
rows, and whole weights that were trained with the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from models.adapters.adapter import TIED_HEAD, Adapter, Pair
from models.adapters.fit import Given, check_shape
from models.loading.files.canonical import canonical_name
from models.loading.files.checkpoint import Checkpoint
from models.loading.files.experts import expert_of
from models.recipes import Piece, Recipes


class Merging:
    """The tensors of a base with an adapter in them.

    Args:
        checkpoint: the base's tensors.
        recipes: the network's: which tensors it is made of.
        adapter: read with `merging`, so that it has magnitudes and whole weights too.
    Attributes:
        unties: the result has an output projection of its own, which the base's checkpoint has not.
    """

    def __init__(self, checkpoint: Checkpoint, recipes: Recipes, adapter: Adapter) -> None:
        self._checkpoint, self._adapter = checkpoint, adapter
        self._pieces = {piece.name: piece for recipe in recipes.values() for piece in recipe.pieces}
        table = recipes.get("embed.weight")
        self._table = None if table is None else table.pieces[0].name
        self._given = Given.of(adapter, adapter.rank)
        self._whole = {canonical_name(name): name for name in adapter.whole}
        self._experts = {
            part: own for plain, own in self._given.names.items() if (part := expert_of(canonical_name(plain)))
        }
        self._used: set[str] = set()
        changes = self._given.own_name(TIED_HEAD) is not None or TIED_HEAD in self._whole
        self.unties = TIED_HEAD not in self._pieces and changes

    @property
    def num_changed(self) -> int:
        """The adapter's weights that `tensors` has put in so far."""
        return len(self._used)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(Hugging Face's name, values) of all; those that are changed in float32.

        Raises:
            ValueError: something of the adapter changes nothing here, or has another shape than its weight.
        """
        for name, piece in self._pieces.items():
            yield name, self._changed(name, piece, self._checkpoint.read(name))
            if self.unties and name == self._table:
                yield TIED_HEAD, self._changed(TIED_HEAD, piece, self._checkpoint.read(name))
            self._checkpoint.release(name)
        names = {*self._adapter.pairs, *self._adapter.whole}
        left = sorted(names - self._used)
        if left:
            raise ValueError(
                f"{self._adapter.source}: {len(left)} of its {len(names)} weights change none of the base ({', '.join(left[:3])}"
                f"{', ...' if len(left) > 3 else ''})."
            )

    def _changed(self, name: str, piece: Piece, values: np.ndarray) -> np.ndarray:
        whole = self._whole.get(canonical_name(name))
        if whole is not None:
            self._used.add(whole)
            replacement = self._adapter.whole[whole]
            if replacement.shape != values.shape:
                raise ValueError(
                    f"{self._adapter.source}: {whole} has shape {list(replacement.shape)}; the base's has {list(values.shape)}."
                )
            values = replacement
        expert = expert_of(name)
        if expert is not None:
            return self._with_experts(expert, piece, values)
        own = self._given.own_name(name)
        if own is None:
            return values
        self._used.add(own)
        pair = self._adapter.pairs[own]
        turned = piece.turned or name == self._table
        rows_OI = values.astype(np.float32)
        rows_OI = rows_OI.T if turned else rows_OI
        check_shape(pair, own, rows_OI.shape[0], rows_OI.shape[1], self._adapter.source)
        rows_OI = rows_OI + pair.b_Or @ pair.a_rI
        magnitude_O = self._adapter.magnitudes.get(own)
        if magnitude_O is not None:
            if name == self._table or magnitude_O.shape != rows_OI.shape[:1]:
                raise ValueError(f"{self._adapter.source}: the magnitudes of {own} are not one a row of a product.")
            rows_OI = rows_OI * (magnitude_O / np.linalg.norm(rows_OI, axis=1))[:, None]
        return rows_OI.T if turned else rows_OI

    def _with_experts(self, part: tuple[str, int | None, str], piece: Piece, values: np.ndarray) -> np.ndarray:
        """One expert's tensor, or that of all."""
        layer, expert, role = part
        if expert is not None:
            change = self._of_expert(layer, expert, role)
            return values if change is None else values.astype(np.float32) + (change.T if piece.turned else change)
        changes = [self._of_expert(layer, e, role) for e in range(values.shape[0])]
        if all(change is None for change in changes):
            return values
        out = values.astype(np.float32)
        for e, change in enumerate(changes):
            if change is not None:
                out[e] += change.T if piece.turned else change
        return out

    def _of_expert(self, layer: str, expert: int, role: str) -> np.ndarray | None:
        """The change [O, I] of one expert's projection."""
        own = self._experts.get((layer, expert, role))
        half = None
        if own is None and role in ("gate", "up"):
            own, half = self._experts.get((layer, expert, "gate_up")), role
        if own is None:
            return None
        self._used.add(own)
        pair: Pair = self._adapter.pairs[own]
        change = pair.b_Or @ pair.a_rI
        middle = change.shape[0] // 2
        return change if half is None else change[:middle] if half == "gate" else change[middle:]


def config_of(hf_config: Mapping[str, object], merging: Merging) -> dict[str, object]:
    """The result's config.json: dense, and with a head of its own where the adapter gave it one."""
    config = {name: value for name, value in hf_config.items() if name != "quantization_config"}
    return config | ({"tie_word_embeddings": False} if merging.unties else {})
