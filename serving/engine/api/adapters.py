"""Adapters as front ends see them."""

from __future__ import annotations

import dataclasses
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter, as clients see it.

    Attributes:
        name: what requests call it.
        path: where it was read.
        digest: of its content, in hexadecimal: what its pages are found by.
        rank: the largest of its matrices'.
        num_matrices: pairs that it applies.
    """

    name: str
    path: str
    digest: str
    rank: int
    num_matrices: int


@dataclasses.dataclass(frozen=True)
class LoRARequest:
    """Which adapter a request runs with. Names are vLLM's.

    Attributes:
        lora_name: what it is called from now on.
        lora_int_id: vLLM's number of it; nothing is found by it here.
        lora_path: a PEFT directory, read when the name is new.
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""


class AdapterClient(Protocol):
    """What an engine that takes adapters offers beside `EngineClient`. Blocks; may be called from any thread but the engine's."""

    def load(self, name: str, path: str, replace: bool = False) -> AdapterInfo:
        """Reads a PEFT directory and registers it under a name. Nothing is compiled, and running streams go on.

        Args:
            replace: take the place of an adapter of that name: running requests end with the old one.
        Raises:
            ValueError: a name in use, or an adapter that cannot be served here, in a sentence.
        """
        ...

    def unload(self, name: str) -> AdapterInfo:
        """Forgets a name. Requests that run with the adapter end with it.

        Raises:
            KeyError: there is none of that name.
        """
        ...

    def find(self, name: str) -> AdapterInfo | None:
        """The adapter of a name."""
        ...

    def infos(self) -> list[AdapterInfo]:
        """All, in the order in which they were loaded."""
        ...
