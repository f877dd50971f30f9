"""What an adapter is once it is read: pairs of small matrices by the names of the tensors that they change."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping

import numpy as np

from models.loading.files.canonical import canonical_name

TIED_HEAD = "lm_head.weight"
"""What adapters call the output projection of a model whose checkpoint has none of its own."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """The change of one weight: y += (x A^T) B^T. The scale alpha / r is in B.

    Attributes:
        a_rI: float32.
        b_Or: float32. For an embedding A is [r, V] and B [D, r]: row x of the table grows by A[:, x] B^T.
    """

    a_rI: np.ndarray
    b_Or: np.ndarray

    @property
    def rank(self) -> int:
        return self.a_rI.shape[0]


@dataclasses.dataclass(frozen=True)
class Base:
    """What a reader has to know of the model that an adapter is for.

    Attributes:
        tensors: Hugging Face's names of those that adapters may change.
        num_layers: its layers.
        heads: query heads and key heads.
        experts: how many a mixture has, and inputs and hidden width of one; None for other models.
        tables: plain names of those whose rows are looked up.
        tied: the one of `tables` that makes logits too; "" where the head is a tensor of its own.
        turned: plain names of those that the checkpoint has as [in, out].
        max_rank: that a slot has room for.
        read: values of one of `tensors`, as the checkpoint has them; None where they cannot be had.
    """

    tensors: tuple[str, ...]
    num_layers: int
    heads: tuple[int, int]
    experts: tuple[int, int, int] | None = None
    tables: frozenset[str] = frozenset()
    tied: str = ""
    turned: frozenset[str] = frozenset()
    max_rank: int = 0
    read: Callable[[str], np.ndarray] | None = None

    def find(self, name: str) -> str | None:
        """Which of `tensors` has the values of a name, whatever was wrapped around it; None for none of them."""
        plain = canonical_name(name)
        if plain == TIED_HEAD and self.tied:
            return self.tied
        return next((own for own in self.tensors if canonical_name(own) == plain), None)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank change of a base model.

    Attributes:
        pairs: by the name of the base's tensor in Hugging Face's naming ("model.layers.0.self_attn.q_proj.weight").
        base: the base model that its file names; "" where it names none.
        source: where it came from, for messages.
        magnitudes, whole: what can only be merged, and is read for that alone: the lengths [O] that DoRA gives the rows of a
            changed weight, and weights in place of the base's.
    """

    pairs: Mapping[str, Pair]
    base: str
    source: str
    magnitudes: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    whole: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest of its pairs."""
        return max((pair.rank for pair in self.pairs.values()), default=0)

    @property
    def num_bytes(self) -> int:
        """Of its matrices in float32."""
        return sum(pair.a_rI.nbytes + pair.b_Or.nbytes for pair in self.pairs.values())

    def digest(self) -> bytes:
        """16 bytes that another content does not share: what pages computed under the adapter are found by. Never its name,
        which may come to mean another file."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self.pairs):
            pair = self.pairs[name]
            for part in (name.encode(), repr((pair.a_rI.shape, pair.b_Or.shape)).encode(), pair.a_rI, pair.b_Or):
                content = part if isinstance(part, bytes) else part.tobytes()
                digest.update(len(content).to_bytes(8, "little"))
                digest.update(content)
        return digest.digest()
