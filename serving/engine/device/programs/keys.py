"""What a compiled program is found by: what it does, for which shape, of which component."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Kind = Literal[
    "forward",
    "sample",
    "decode_loop",
    "prompt_logprobs",
    "pool",
    "load_slot",
    "load_adapter",
    "read_pages",
    "write_pages",
    "read_snapshot",
    "write_snapshot",
    "save_states",
    "load_states",
    "clear_states",
    "draft",
    "put_drafts",
    "hear",
    "catch_up",
    "commit_states",
    "encode",
]

DECODER = "decoder"
"""The component that an engine has always; see components.py."""

DRAFT = "draft"
"""The component that guesses what the decoder will say, where there is one; see draft.py."""


VISION = "vision"
"""The component that reads images, where there is one; see media.py."""


@dataclasses.dataclass(frozen=True)
class ProgramKey:
    """Names one program of an engine. Whoever lists programs, compiles them, calls them or plans for them makes the same key.

    Attributes:
        kind: which of `programs`' functions it is.
        shape: what it is compiled for: a bucket, or a number of rows or tokens. None where there is one only.
        variant: another program for the same shape, such as "with adapters".
        component: whose it is.
    """

    kind: Kind
    shape: Any = None
    variant: str = ""
    component: str = DECODER

    def __str__(self) -> str:
        """For people, and for files of executables."""
        parts = [self.kind, "" if self.shape is None else str(self.shape), self.variant]
        name = " ".join(part for part in parts if part)
        return name if self.component == DECODER else f"{self.component}: {name}"
