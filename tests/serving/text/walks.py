"""Random walks through token masks: what a model of noise would write under a constraint."""

from __future__ import annotations

import random

import numpy as np

from serving.engine.api.constraint import TokenConstraint
from serving.text.tokenizer import Tokenizer

CLOSERS = ("</think>", '"', "}", "]", '"}', '"]', "}}", "]}", ",", ":")


def allowed_ids(constraint: TokenConstraint, vocab_size: int) -> np.ndarray:
    mask = np.zeros((vocab_size + 31) // 32, np.int32)
    constraint.fill_mask(mask)
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab_size].nonzero()[0]


def walk(
    constraint: TokenConstraint,
    tokenizer: Tokenizer,
    rng: random.Random,
    free_tokens: int = 40,
    max_tokens: int = 600,
) -> list[int] | None:
    """Token ids until the grammar is complete or ends by itself; None where it took more than `max_tokens`.

    After `free_tokens` random steps the walk heads for the end: it closes what it can, and prefers short tokens.
    """
    eos = set(tokenizer.eos_token_ids)
    closers = [i for text in CLOSERS if (i := tokenizer.token_to_id(text))]
    ids: list[int] = []
    for step in range(max_tokens):
        allowed = allowed_ids(constraint, tokenizer.vocab_size)
        assert len(allowed), f"a dead end behind {tokenizer.decode(ids)!r}"
        choice = int(rng.choice(allowed))
        if step >= free_tokens:
            known = set(allowed.tolist())
            ending = [i for i in (*eos, *closers) if i in known]
            if ending and rng.random() < 0.9:
                choice = ending[0]
        if choice in eos:
            assert constraint.accept(choice)
            assert constraint.finished
            return ids
        assert constraint.accept(choice)
        ids.append(choice)
        if constraint.finished:
            return ids
    return None
