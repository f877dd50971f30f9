"""Paged attention spelled out in numpy, one query after the other: what every body is tested against."""

from __future__ import annotations

import numpy as np

from ops.paged_attention.batch import AttentionBatch


def attend(
    q_TKGh: np.ndarray,
    k_TKh: np.ndarray,
    v_TKh: np.ndarray | None,
    k_NsKh: np.ndarray,
    v_NsKh: np.ndarray | None,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_KG: np.ndarray | None = None,
    chunk: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """What ops.paged_attention.attend computes, in float64, on pages that lie plainly as [page, slot, K, h].

    Args:
        batch: an AttentionBatch of numpy arrays.
    Returns:
        (out_TKGh, k_NsKh and v_NsKh with the new tokens); the null page of the latter is arbitrary.
    """
    page_size = k_NsKh.shape[1]
    k_NsKh = k_NsKh.astype(np.float64)
    v_NsKh = None if v_NsKh is None else v_NsKh.astype(np.float64)
    for token, index in enumerate(np.asarray(batch.kv_index_T)):
        k_NsKh[index // page_size, index % page_size] = k_TKh[token]
        if v_NsKh is not None and v_TKh is not None:
            v_NsKh[index // page_size, index % page_size] = v_TKh[token]
    values_NsKh = k_NsKh if v_NsKh is None else v_NsKh
    out_TKGh = np.zeros((*q_TKGh.shape[:3], values_NsKh.shape[-1]))
    for token, pages_P, position in _queries(batch):
        first = 0 if window is None else max(0, position - window + 1)
        if chunk is not None:
            first = max(first, position // chunk * chunk)
        seen = np.arange(first, position + 1 + _ahead(batch, token))
        k_SKh = k_NsKh[pages_P[seen // page_size], seen % page_size]
        v_SKh = values_NsKh[pages_P[seen // page_size], seen % page_size]
        score_KGS = np.einsum("kgh,skh->kgs", q_TKGh[token].astype(np.float64), k_SKh) * scale
        if softcap is not None:
            score_KGS = softcap * np.tanh(score_KGS / softcap)
        best_KG = score_KGS.max(axis=-1)
        if sinks_KG is not None:
            best_KG = np.maximum(best_KG, sinks_KG)
        weight_KGS = np.exp(score_KGS - best_KG[..., None])
        total_KG = weight_KGS.sum(axis=-1)
        if sinks_KG is not None:
            total_KG = total_KG + np.exp(sinks_KG - best_KG)
        out_TKGh[token] = np.einsum("kgs,skh->kgh", weight_KGS / total_KG[..., None], v_SKh)
    return out_TKGh, k_NsKh, v_NsKh


def _ahead(batch: AttentionBatch, token: int) -> int:
    """How many positions behind its own a token attends to."""
    place = token - batch.num_decode_tokens
    return 0 if batch.chunk_ahead_C is None or place < 0 else int(batch.chunk_ahead_C[place])


def _queries(batch: AttentionBatch):
    """(token, page table, position) of every token that is not padding."""
    qlen_B = np.minimum(batch.decode_len_B, 1) if batch.decode_qlen_B is None else batch.decode_qlen_B
    for row, (qlen, length) in enumerate(zip(qlen_B, batch.decode_len_B, strict=True)):
        for place in range(int(qlen)):
            token = row * batch.queries + place
            yield token, np.asarray(batch.decode_pages_BP[row]), int(length - qlen) + place
    for row, (start, qlen, length) in enumerate(
        zip(batch.chunk_start_R, batch.chunk_qlen_R, batch.chunk_len_R, strict=True)
    ):
        for token in range(int(qlen)):
            yield (
                batch.num_decode_tokens + int(start) + token,
                np.asarray(batch.chunk_pages_RP[row]),
                int(length - qlen) + token,
            )
