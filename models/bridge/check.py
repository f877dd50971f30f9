"""How far a model's logits are from transformers' own: over pages, a prompt in pieces and then single steps, in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.api import Step
from ops.paged_attention import Q_BLOCK, AttentionBatch, allocate

TOKENS, PREFILL, PAGE = 48, 40, 16
WRONG = 1e-3
"""The largest difference of logits over the largest logit: 1e-6 where all is right, 0.1 and more where something is missed."""


def some_tokens(vocab: int) -> list[int]:
    """The same ones every time."""
    return np.random.default_rng(0).integers(0, vocab, TOKENS).tolist()


def difference(model: Any, tokens: list[int], wanted_TV: np.ndarray) -> float:
    """The largest difference of logits over the largest logit."""
    with jax.default_matmul_precision("highest"):
        logits_TV = paged_logits(model, tokens)
    return float(np.abs(logits_TV - wanted_TV).max() / np.abs(wanted_TV).max())


def paged_logits(model: Any, tokens: list[int]) -> np.ndarray:
    """logits_TV of a text: pieces of Q_BLOCK tokens, then single steps."""
    pages = -(-len(tokens) // PAGE)
    kv = tuple(allocate(spec, pages + 1, PAGE, jnp.float32) for spec in model.kv_specs())
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: Any, step: Step, kv: Any) -> Any:
        merged = nnx.merge(graphdef, state)
        result = merged.forward(step, kv)
        return merged.logits(result.hidden_TD), result.cache

    rows, at = [], 0
    while at < len(tokens):
        count = min(Q_BLOCK, PREFILL - at) if at < PREFILL else 1
        logits, kv = run(state, _step(tokens, at, count, pages, at < PREFILL), kv)
        rows.append(np.asarray(logits)[:count])
        at += count
    return np.concatenate(rows)


def _step(tokens: list[int], at: int, count: int, pages: int, chunk: bool) -> Step:
    """One request's next tokens, as a piece of a prompt or as a decode row."""
    T = Q_BLOCK if chunk else 1
    given, positions, index = np.zeros(T, np.int32), np.zeros(T, np.int32), np.zeros(T, np.int32)
    given[:count], positions[:count] = tokens[at : at + count], np.arange(at, at + count)
    table = np.arange(1, pages + 1, dtype=np.int32)[None]
    index[:count] = PAGE + positions[:count]
    rows, none = (1, 0) if chunk else (0, 1)
    fields = (
        index,
        table[:none],
        np.array([at + count] * none, np.int32),
        table[:rows],
        np.zeros(rows, np.int32),
        np.array([count] * rows, np.int32),
        np.array([at + count] * rows, np.int32),
        np.zeros(rows, np.int32),
    )
    arrays: list[Any] = [jnp.asarray(field) for field in fields]
    batch = AttentionBatch(*arrays)
    return Step(jnp.asarray(given), jnp.asarray(positions), batch)
