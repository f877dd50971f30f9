"""An adapter's matrices for the experts of a mixture, whichever of the layouts it was saved in.

One module an expert (`experts.3.gate_proj`), or all experts of a layer in one: the reader has taken these apart into
`experts.3.gate_up_proj`, whose rows are in the order of the checkpoint's fused tensor.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from models.adapters.adapter import Pair
from models.adapters.fit import Given, Matrices, Site, check_shape
from models.loading.files.canonical import canonical_name
from models.loading.files.experts import expert_of
from models.recipes import row_map


@dataclasses.dataclass(frozen=True)
class ExpertSite(Site):
    """Gate and up, or down, of all experts of a layer. Its A is [E R, I], its B [E R, O] turned: expert after expert.

    Attributes:
        layer: its name in checkpoints ("model.layers.0").
        experts: how many.
        down: which of the two.
    """

    layer: str = ""
    experts: int = 0
    down: bool = False

    def rank(self, rank: int) -> int:
        return self.experts * self.rank_of_one(rank)

    def rank_of_one(self, rank: int) -> int:
        """Of one expert: gate and up may have a pair each."""
        return rank if self.down else 2 * rank

    @functools.cached_property
    def roles(self) -> tuple[str, ...]:
        """What the checkpoint's tensors of an expert are."""
        parts = (expert_of(piece.name) for piece in self.recipe.pieces)
        return tuple(dict.fromkeys(part[2] for part in parts if part is not None))

    @functools.cached_property
    def order(self) -> np.ndarray:
        """Of each row of an expert's parameter, which row it is of the checkpoint's: those of gate, then of up, where they are two
        tensors, else as the fused tensor has them."""
        mapped = row_map(self.recipe)
        assert mapped is not None, "sites move rows"
        piece_O, row_O = (part[: self.outputs] for part in mapped)
        first = {piece: index for index, piece in enumerate(dict.fromkeys(sorted(piece_O.tolist())))}
        rows = self.outputs // len(first)
        return np.array([first[piece] * rows for piece in piece_O.tolist()]) + row_O

    def take(self, given: Given) -> Matrices | None:
        found: dict[tuple[int, str], str] = {}
        for plain, own in given.names.items():
            expert = expert_of(canonical_name(plain))
            if expert is None or expert[0] != self.layer or expert[1] is None or (expert[2] == "down") != self.down:
                continue
            found[expert[1], expert[2]] = own
        if not found:
            return None
        R, source = self.rank_of_one(given.max_rank), given.adapter.source
        a_ERI = np.zeros((self.experts, R, self.inputs), np.float32)
        b_EOR = np.zeros((self.experts, self.outputs, R), np.float32)
        for (expert, role), own in found.items():
            if expert >= self.experts:
                raise ValueError(f"{source}: {own} is of expert {expert}; the served model has {self.experts} a layer.")
            pair = given.adapter.pairs[own]
            begin, rows = self._place(role, own, pair, given)
            check_shape(pair, own, rows.stop - rows.start, self.inputs, source)
            a_ERI[expert, begin : begin + pair.rank] = pair.a_rI
            b_EOR[expert, rows, begin : begin + pair.rank] = pair.b_Or
        b_EOR = b_EOR[:, self.order]
        # Of all experts one behind the other, as `Room.pack` lays out any site.
        b_OR = b_EOR.transpose(1, 0, 2).reshape(self.outputs, -1)
        return Matrices(a_ERI.reshape(-1, self.inputs), b_OR, frozenset(found.values()))

    def _place(self, role: str, own: str, pair: Pair, given: Given) -> tuple[int, slice]:
        """From which column of an expert's B on a pair goes, and into which of the checkpoint's rows."""
        if role in self.roles:
            index, rows = self.roles.index(role), self.outputs // len(self.roles)
            return index * given.max_rank, slice(index * rows, (index + 1) * rows)
        if role == "gate_up" and self.roles == ("gate", "up"):
            return 0, slice(0, self.outputs)
        raise ValueError(f"{given.adapter.source}: {own} changes experts that the served model keeps in another form.")
