"""What a file of weights looks like to the loader, whatever its format."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np


class Checkpoint(Protocol):
    """Tensors by Hugging Face's names. Reading is thread-safe and touches only the tensor asked for."""

    @property
    def own_names(self) -> Collection[str]:
        """The names of all tensors as the file writes them."""
        ...

    def canonical(self, name: str) -> str:
        """A tensor's name in the plain language model, without what was wrapped around it when it was saved."""
        ...

    def locate(self, name: str) -> str | None:
        """The file's own name of the tensor that holds `name`; None when there is none."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that `locate` found."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Its values: float32, float16 or bfloat16, whatever is stored (quantized ones come out as float32)."""
        ...

    def release(self, name: str) -> None:
        """Its values are not needed any more: memory that the file occupies in this process may be given back."""
        ...
