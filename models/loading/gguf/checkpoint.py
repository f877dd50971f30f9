"""A GGUF file as the loader sees it: by Hugging Face's names, with the converter's transforms undone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

import gguf
import numpy as np

from models.loading.gguf.file import GGUFFile
from models.loading.gguf.layouts import SECONDARY, layout
from ops.linear.weights.block_pack import GGUF, CodedRows

_MAMBA = re.compile(r"^model\.")
NORMS_HAVE_ONE = ("gemma", "gemma2", "gemma3", "gemma-embedding", "qwen3next", "qwen35", "qwen35moe")
"""Architectures whose norms' scales the converter stores whole."""
EXPERT = re.compile(r"\.experts\.(\d+)\.")


def table_names(table: gguf.TensorNameMap, name: str) -> Iterator[str]:
    """What GGUF may call a tensor. The table has Mamba's authors' name for some, and experts under one name for all."""
    plain = EXPERT.sub(".experts.", name)
    for known in (
        plain,
        _MAMBA.sub("backbone.", plain),
        re.sub(r"\.(mixer|feed_forward)\.experts\.", ".mlp.experts.", plain),
        _MAMBA.sub("", plain),
    ):
        own = table.get_name(known, try_suffixes=(".weight", ".bias"))
        if own is not None:
            yield own


class GGUFCheckpoint:
    """A GGUF file's tensors by Hugging Face's names, with the transforms of the GGUF converter undone.

    Args:
        file: the file.
        architecture: its `general.architecture`.
        rotated_pairs: heads of q and k whose rows were permuted for interleaved rotary pairs: (query heads, key heads),
            or None where the converter leaves them.
    """

    def __init__(self, file: GGUFFile, architecture: str, num_layers: int, rotated_pairs: tuple[int, int] | None):
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        self.file = file
        self._table = gguf.get_tensor_name_map(kinds[architecture], num_layers)
        self._rotated_pairs = rotated_pairs
        self._norms_have_one = architecture in NORMS_HAVE_ONE
        self._architecture = architecture

    @property
    def own_names(self) -> Collection[str]:
        second = SECONDARY.get(self._architecture)
        return [name for name in self.file.tensors if second is None or not second.search(name)]

    def canonical(self, name: str) -> str:
        return name

    def locate(self, name: str) -> str | None:
        made = layout(self.file, self._architecture, name)
        if made is not None:
            return made.sources[0]
        expert = EXPERT.search(name)
        for own in table_names(self._table, name):
            shape = self.file.tensors[own].shape if own in self.file.tensors else None
            if shape is not None and (expert is None or (shape and int(expert[1]) < shape[0])):
                return own
        return None

    def shape(self, name: str) -> tuple[int, ...]:
        made = layout(self.file, self._architecture, name)
        if made is not None:
            return made.shape
        own = self.locate(name)
        assert own is not None
        shape = self.file.tensors[own].shape
        return shape[1:] if EXPERT.search(name) else shape

    def release(self, name: str) -> None:
        made = layout(self.file, self._architecture, name)
        for own in (self.locate(name),) if made is None else made.sources:
            if own is not None:
                self.file.release(own)

    def coded(self, name: str, turned: bool = False) -> tuple[CodedRows, np.ndarray | None] | None:
        """As `models.loading.coded.CodedCheckpoint`: rows of blocks, where their type has an exact form."""
        own = self.locate(name)
        if own is None or not self.is_coded(name, turned):
            return None
        made, info = layout(self.file, self._architecture, name), self.file.tensors[own]
        expert, rows_RB = EXPERT.search(name), self._rows(own)
        if made is not None and made.join is not None:
            rows_RB = made.join(*(self._rows(source) for source in made.sources))
        elif expert and len(info.shape) == 3:
            rows_RB = rows_RB[int(expert[1])]
        rows_RB = np.ascontiguousarray(rows_RB).reshape(-1, rows_RB.shape[-1])
        code = CodedRows(GGUF[info.kind.value][1], info.shape[-1], rows_RB, info.kind.value)
        if made is not None:
            return code, made.rows
        heads = 0
        if self._rotated_pairs is not None:
            heads = (
                self._rotated_pairs[0] if ".q_proj." in name else self._rotated_pairs[1] if ".k_proj." in name else 0
            )
        return code, half_split_rows(np.arange(len(rows_RB)), heads) if heads else None

    def _rows(self, own: str) -> np.ndarray:
        """A tensor's bytes, row by row."""
        return self.file.raw(own).reshape(*self.file.tensors[own].shape[:-1], -1)

    def is_coded(self, name: str, turned: bool = False) -> bool:
        """As `models.loading.coded.CodedCheckpoint`."""
        own = self.locate(name)
        made = layout(self.file, self._architecture, name)
        if own is None or turned != (made is not None and made.turned):
            return False
        info, expert = self.file.tensors[own], EXPERT.search(name)
        if info.kind.value not in GGUF or len(info.shape) not in (2, 3):
            return False
        if made is not None and made.join is not None:
            return all(self.file.tensors[source].kind == info.kind for source in made.sources)
        if expert and (len(info.shape) < 3 or int(expert[1]) >= info.shape[0]):
            return False
        return made is None or made.rows is not None

    def read(self, name: str) -> np.ndarray:
        made = layout(self.file, self._architecture, name)
        if made is not None:
            return made.make(*(self.file.read(source, made.matrix) for source in made.sources))
        own = self.locate(name)
        assert own is not None
        expert = EXPERT.search(name)
        values = self.file.read(own, int(expert.group(1)) if expert else None)
        if self._rotated_pairs is not None:
            queries, keys = self._rotated_pairs
            if ".q_proj." in name:
                return half_split_rows(values, queries)
            if ".k_proj." in name:
                return half_split_rows(values, keys)
        if self._norms_have_one and name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            return values.astype(np.float32) - 1.0
        return values


def half_split_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes GGUF's interleaving of each head's rows: pairs (2i, 2i + 1) go back to (i, i + h / 2)."""
    rest = rows.shape[1:]
    return rows.reshape(heads, -1, 2, *rest).swapaxes(1, 2).reshape(rows.shape)
