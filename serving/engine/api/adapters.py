"""Adapters as front ends see them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
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
        tenants: names of the keys that may use it; None: all may.
        base: the model that it names as the one it was trained on; "" where it names none.
        own_text: where the engine is elsewhere: it has a chat template or tokens of its own, which are not known here.
    """

    name: str
    path: str
    digest: str
    rank: int
    num_matrices: int
    tenants: tuple[str, ...] | None = None
    own_text: bool = False
    base: str = ""


@dataclasses.dataclass(frozen=True)
class LoRARequest:
    """Which adapter a request runs with. Names are vLLM's.

    Attributes:
        lora_name: what it is called from now on.
        lora_int_id: vLLM's number of it; nothing is found by it here.
        lora_path: a PEFT directory, a GGUF file or a hub id, read when the name is new.
        tenants: names of the API keys that may use it; None: all may.
        base_model_name: vLLM's; taken and not looked at.
        load_inplace: read it again, once a call, though its name and path are known.
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""
    tenants: tuple[str, ...] | None = None
    base_model_name: str | None = None
    load_inplace: bool = False


@dataclasses.dataclass(frozen=True)
class AdapterLoad:
    """Which adapters are in use, by name.

    Attributes:
        running, waiting: those that running and that waiting requests have.
        most: how many may be in one batch.
    """

    running: tuple[str, ...]
    waiting: tuple[str, ...]
    most: int


class AdapterClient(Protocol):
    """What an engine that takes adapters offers beside `EngineClient`. `load` and `unload` block; all may be called from any
    thread but the engine's."""

    def locate(self, path: str) -> Path:
        """Where an adapter lies on the engine's machine; what a hub id names is fetched where it is not there.

        Raises:
            ValueError: there is nothing of that name.
            RequestError: UNIMPLEMENTED where the engine is elsewhere.
        """
        ...

    def load(
        self,
        name: str,
        path: str,
        replace: bool = False,
        *,
        within: Path | None = None,
        tenants: tuple[str, ...] | None = None,
    ) -> AdapterInfo:
        """Reads an adapter and registers it under a name. Nothing is compiled, and running streams go on.

        Args:
            replace: take the place of an adapter of that name: running requests end with the old one.
            within: a folder that no file may lead out of, by links neither; None: wherever they lie.
            tenants: names of the keys that may use it; None: all may.
        Raises:
            ValueError: a name in use, or an adapter that cannot be served here, in a sentence.
            RequestError: UNIMPLEMENTED where the engine is elsewhere.
        """
        ...

    def unload(self, name: str) -> AdapterInfo:
        """Forgets a name. Requests that run with the adapter end with it.

        Raises:
            KeyError: there is none of that name.
            RequestError: UNIMPLEMENTED where the engine is elsewhere.
        """
        ...

    def find(self, name: str) -> AdapterInfo | None:
        """The adapter of a name."""
        ...

    def infos(self) -> list[AdapterInfo]:
        """All, in the order in which they were loaded."""
        ...

    def load_now(self) -> AdapterLoad | None:
        """Which of them are in use; None where that is not known."""
        ...
