"""What one way of packing weights is asked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import numpy as np

from models.loading.files.safetensors import SafetensorsCheckpoint
from models.loading.packed.exact import block_of
from ops.linear.weights.block_pack import CodedRows


class Scheme:
    """One way of packing. Subclasses say which tensors are theirs (`dense_name`), and unpack them (`shape`, `read`).

    Args:
        tensors: the checkpoint as it was saved.
        config: `quantization_config` of config.json; may be empty, where tensors say all.
        method: what the configuration calls it, for errors.
    """

    turned: ClassVar[bool] = False
    """Whether the dense tensor is [..., in, out], and `coded` gives the rows of its last axis."""

    def __init__(self, tensors: SafetensorsCheckpoint, config: Mapping[str, Any], method: str):
        self.tensors, self.config, self.method = tensors, config, method

    def dense_name(self, own: str) -> str | None:
        """The name of the dense tensor that `own` stands for; None where it is not packed like this."""
        raise NotImplementedError

    def needs(self, own: str) -> Collection[str]:
        """The other tensors without which it cannot be read."""
        return ()

    def shape(self, own: str) -> tuple[int, ...]:
        """Of the dense tensor. Raises ValueError where the numbers do not fit each other."""
        raise NotImplementedError

    def read(self, own: str) -> np.ndarray:
        """The dense tensor as float32."""
        raise NotImplementedError

    def coded(self, own: str) -> CodedRows | None:
        """The tensor as it is stored, in blocks; None where it has no exact form there. Only of what `is_coded`."""
        return None

    def is_coded(self, own: str) -> bool:
        """Whether it has an exact form in blocks, as far as headers say it."""
        return False

    def narrow(self, own: str) -> tuple[np.ndarray, np.ndarray] | None:
        """The tensor as it is stored in float8 or signed bytes, and a float32 scale for each group of neighbours of a row,
        [O, groups]; None where it is not that alone. Only of what `is_narrow`."""
        return None

    def is_narrow(self, own: str) -> bool:
        """Whether it is that, as far as headers say it."""
        return False

    def _is_coded(self, columns: int, groups: int) -> bool:
        group = self.group_of(columns, groups)
        return isinstance(group, int) and block_of(group, columns) is not None

    def check(self, own: str) -> None:
        """Raises ValueError, from headers alone, where `own` cannot be read."""
        missing = [name for name in self.needs(own) if not self.has(name)]
        if missing:
            raise ValueError(
                f"the quantized checkpoint has no tensor {missing[0]!r}: without it {own!r} ({self.method}) cannot be read."
            )
        try:
            self.shape(own)
            self.is_coded(own)  # looks at scales too
        except (IndexError, TypeError, ZeroDivisionError, ValueError) as error:
            raise ValueError(f"the tensor {own!r} is not as {self.method} stores it: {error}.") from None

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of exactly this name."""
        return name in self.tensors.own_names

    def first(self, *names: str) -> str | None:
        """The first of these that the checkpoint has."""
        return next((name for name in names if self.has(name)), None)

    def need(self, name: str) -> np.ndarray:
        return self.tensors.read(name)

    def optional(self, name: str) -> np.ndarray | None:
        return self.tensors.read(name) if self.has(name) else None

    def group_of(self, columns: int, groups: int, order: np.ndarray | None = None) -> np.ndarray | int:
        """Which of the groups each input is in where inputs were sorted (`order`), else how many neighbours are one."""
        size = self.group_size
        if not groups:
            raise ValueError("it has no scales")
        if not size or -(-columns // size) != groups:
            size = -(-columns // groups)
        if order is None or (order < 0).any() or (order == np.arange(columns) // size).all():
            return size
        return order

    @property
    def group_size(self) -> int:
        """Inputs that share a scale, as the configuration says it; 0 where it does not, or for whole rows."""
        weights = weights_config(self.config)
        size = weights.get("group_size") or self.config.get("group_size") or self.config.get("q_group_size") or 0
        return max(int(size), 0)


def weights_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What compressed-tensors says of the weights; nothing for other schemes."""
    groups = list((config.get("config_groups") or {}).values())
    return (groups[0].get("weights") or {}) if groups and isinstance(groups[0], Mapping) else {}


def with_columns(array: np.ndarray, factor: np.ndarray | None) -> np.ndarray:
    """A matrix whose inputs were to be multiplied by `factor` [I] before it (AWQ's smoothing), taken into it."""
    return array if factor is None else array * factor.astype(np.float32).reshape(-1)
