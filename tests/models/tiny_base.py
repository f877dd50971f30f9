"""What the tiny random models of every family have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

VOCAB = 384
PROMPTS = (37, 21)  # tokens; longer than every window below
STEPS = 64

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A transformers configuration class and what differs from `BASE`; a value of None leaves the field out.

    Attributes:
        config: class name in transformers.
        model: class name in transformers.
        fields: over BASE.
        expert_mesh: whether it is also tried on a mesh with an expert axis.
        cached: whether transformers' cache gives what it computes of a whole text; where it does not, the text counts.
    """

    config: str
    model: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    expert_mesh: bool = False
    cached: bool = True
