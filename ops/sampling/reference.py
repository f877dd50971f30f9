"""The sampling rules as slow and obvious numpy, in float64."""

from __future__ import annotations

import numpy as np


def probabilities(logits_V: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """p_V that one row is drawn from."""
    x_V = np.asarray(logits_V, np.float64)
    if temperature < 1e-5:
        p_V = np.zeros(len(x_V))
        p_V[int(np.argmax(x_V))] = 1.0
        return p_V
    x_V = x_V / temperature
    p_V = np.exp(x_V - x_V.max())
    p_V[p_V < min_p] = 0.0
    if 0 < top_k < len(x_V):
        p_V[p_V < np.sort(p_V)[-top_k]] = 0.0
    p_V /= p_V.sum()
    if top_p < 1.0:
        descending_V = np.sort(p_V)[::-1]
        enough = int(np.argmax(np.cumsum(descending_V) >= top_p))
        p_V[p_V < descending_V[enough]] = 0.0
    return p_V / p_V.sum()


def penalized(
    logits_V: np.ndarray, prompt: list[int], output: list[int], repetition: float, presence: float, frequency: float
) -> np.ndarray:
    """The logits after the three penalties, token by token."""
    x_V = np.array(logits_V, np.float64)
    for token in set(prompt) | set(output):
        x_V[token] = x_V[token] / repetition if x_V[token] > 0 else x_V[token] * repetition
    for token in output:
        x_V[token] -= frequency
    for token in set(output):
        x_V[token] -= presence
    return x_V


def logprobs(logits_V: np.ndarray, token: int, num_top: int) -> tuple[float, int, np.ndarray, np.ndarray]:
    """(logprob of the token, its rank from 1, top ids, top logprobs)."""
    x_V = np.asarray(logits_V, np.float64)
    log_p_V = x_V - x_V.max() - np.log(np.sum(np.exp(x_V - x_V.max())))
    order_V = np.argsort(-x_V, kind="stable")[:num_top]
    return float(log_p_V[token]), int(np.sum(x_V >= x_V[token])), order_V, log_p_V[order_V]
