"""Shapes that paged attention is tested and timed on, and random arguments for them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from ops.paged_attention.batch import Q_BLOCK, AttentionBatch, KVSpec


@dataclasses.dataclass(frozen=True)
class Case:
    """One step's attention.

    Attributes:
        num_kv_heads, group, head_dim, v_head_dim: K, G = H / K, and head sizes; v_head_dim 0: one latent for both.
        page_size: tokens a page.
        decode: context length of each decode row, its new tokens included; 0 is a padded row.
        queries: new tokens of each decode row, where some have several; Q is the most that any has.
        chunks: (tokens before this step, tokens in it) of each chunk row; a second number of 0 is a padded row.
        pad_blocks: padded blocks behind the chunk part.
        window, softcap, sinks: as in attend.
        ahead: (first, end) of each chunk row's tokens that attend to each other, whichever comes first.
    """

    num_kv_heads: int = 2
    group: int = 3
    head_dim: int = 64
    v_head_dim: int | None = None
    page_size: int = 16
    decode: tuple[int, ...] = ()
    queries: tuple[int, ...] | None = None
    chunks: tuple[tuple[int, int], ...] = ()
    pad_blocks: int = 0
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    ahead: tuple[tuple[int, int], ...] | None = None

    @property
    def spec(self) -> KVSpec:
        """What such a layer keeps."""
        v_head_dim = self.head_dim if self.v_head_dim is None else self.v_head_dim
        return KVSpec(self.num_kv_heads, self.head_dim, v_head_dim, self.window)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """numpy arguments for a case; `history` is what the pages hold before the step, as [page, slot, K, h]."""

    q_TKGh: np.ndarray
    k_TKh: np.ndarray
    v_TKh: np.ndarray | None
    history_k: np.ndarray
    history_v: np.ndarray | None
    batch: AttentionBatch
    options: dict[str, Any]


TEST_CASES: dict[str, Case] = {
    "decode": Case(decode=(1, 2, 15, 16, 17, 33, 257, 300)),
    "decode_padded_rows": Case(decode=(0, 40, 0, 7, 0)),
    "decode_nothing_real": Case(decode=(0, 0)),
    "verify": Case(decode=(4, 2, 17, 33, 0, 300, 40), queries=(4, 1, 3, 4, 0, 2, 4)),
    "verify_long": Case(decode=(1500, 1300), queries=(5, 3), num_kv_heads=1),
    "verify_mixed": Case(decode=(5, 0, 70), queries=(2, 0, 3), chunks=((0, 18), (48, 9), (0, 0)), pad_blocks=1),
    "verify_one_place": Case(decode=(40, 0, 17), queries=(1, 0, 1), chunks=((10, 20),)),
    "verify_everything": Case(
        decode=(40, 0, 200), queries=(3, 0, 5), chunks=((100, 20),), window=33, softcap=20.0, sinks=True
    ),
    "verify_window_of_one": Case(decode=(9, 17), queries=(4, 2), window=1),
    "verify_multi_head": Case(decode=(30, 31, 3), queries=(2, 3, 3), num_kv_heads=4, group=1),
    "verify_big_group": Case(decode=(70, 40), queries=(6, 2), num_kv_heads=1, group=17),
    "verify_latent": Case(decode=(30, 31), queries=(2, 4), num_kv_heads=1, group=4, head_dim=48, v_head_dim=0),
    "verify_page_32": Case(decode=(34, 33, 70), queries=(4, 1, 3), chunks=((5, 40),), page_size=32),
    "decode_one_long": Case(decode=(1500,), num_kv_heads=1),
    "chunk_fresh": Case(chunks=((0, 40),)),
    "chunk_later": Case(chunks=((37, 50),)),
    "chunk_ends_on_page": Case(chunks=((16, 32),)),
    "chunk_rows": Case(chunks=((0, 5), (100, 17), (0, 0), (31, 16)), pad_blocks=2),
    "chunk_blocks": Case(chunks=((0, 135), (7, 20)), num_kv_heads=1, group=2, head_dim=16),
    "chunk_past_group": Case(chunks=((500, 33), (3, 20))),
    "mixed": Case(decode=(5, 0, 70), chunks=((0, 18), (48, 9), (0, 0)), pad_blocks=1),
    "window": Case(decode=(300, 12, 600), chunks=((290, 40), (0, 30)), window=24),
    "window_of_one": Case(decode=(9, 16), chunks=((3, 20),), window=1),
    "window_beyond": Case(decode=(9, 20), chunks=((3, 20),), window=4096),
    "softcap": Case(decode=(20, 50), chunks=((10, 20),), softcap=5.0),
    "sinks": Case(decode=(20, 0, 50), chunks=((10, 20),), sinks=True),
    "ahead": Case(decode=(40, 7), chunks=((30, 40), (0, 20)), ahead=((3, 37), (0, 0)), window=9),
    "everything": Case(decode=(40, 0, 200), chunks=((100, 20),), window=33, softcap=20.0, sinks=True),
    "multi_head": Case(decode=(30, 31), chunks=((5, 20),), num_kv_heads=4, group=1),
    "multi_query": Case(decode=(30, 31), chunks=((5, 20),), num_kv_heads=1, group=8),
    "odd_group": Case(decode=(70, 31), chunks=((5, 20),), num_kv_heads=2, group=7),
    "big_group": Case(decode=(70,), chunks=((5, 20),), num_kv_heads=1, group=17),
    "head_16": Case(decode=(30, 31), chunks=((5, 20),), head_dim=16),
    "head_24": Case(decode=(30, 31), chunks=((5, 20),), head_dim=24),
    "head_80": Case(decode=(30, 31), chunks=((5, 20),), head_dim=80),
    "head_128": Case(decode=(30, 300), chunks=((5, 20),), head_dim=128, group=4),
    "head_256": Case(decode=(30, 300), chunks=((5, 20),), head_dim=256, group=2),
    "value_head_smaller": Case(decode=(30, 31), chunks=((5, 20),), head_dim=96, v_head_dim=64),
    "value_head_larger": Case(decode=(30, 31), chunks=((5, 20),), head_dim=32, v_head_dim=48),
    "latent": Case(decode=(30, 31), chunks=((5, 20),), num_kv_heads=1, group=4, head_dim=48, v_head_dim=0),
    "page_8": Case(decode=(30, 31), chunks=((5, 20),), page_size=8),
    "page_32": Case(decode=(30, 33, 70), chunks=((5, 40),), page_size=32),
    "page_64": Case(decode=(63, 64, 65), chunks=((60, 20),), page_size=64),
    "tiny": Case(decode=(3, 9), chunks=((2, 5),), num_kv_heads=1, group=2, head_dim=4, page_size=4),
}

_smol = functools.partial(Case, num_kv_heads=3, group=3, head_dim=64)  # SmolLM2-135M's layer
BENCH_CASES: dict[str, Case] = {
    "decode 1 x 128": _smol(decode=(128,)),
    "decode 1 x 4096": _smol(decode=(4096,)),
    "decode 8 x 4096": _smol(decode=(4096,) * 8),
    "decode 16 x 160": _smol(decode=(160,) * 16),
    "decode 64 x 256": _smol(decode=(256,) * 64),
    "prefill 8 x 128": _smol(chunks=((0, 128),) * 8),
    "prefill 1 x 1024": _smol(chunks=((0, 1024),)),
    "prefill 1024 after 3072": _smol(chunks=((3072, 1024),)),
    "mixed 16 x 256 + 512": _smol(decode=(256,) * 16, chunks=((0, 512),)),
    "verify 16 x 256, 4 each": _smol(decode=(256,) * 16, queries=(4,) * 16),
    "verify 1 x 4096, 8 each": _smol(decode=(4096,), queries=(8,)),
    "wide decode 8 x 1024": Case(decode=(1024,) * 8, num_kv_heads=8, group=4, head_dim=128),
}


def make_arguments(case: Case, seed: int = 0, leftovers: float = np.nan) -> Arguments:
    """Random float32 arguments; pages are scattered, and every slot that no query may see holds `leftovers`."""
    rng = np.random.default_rng(seed)
    size, K, spec = case.page_size, case.num_kv_heads, case.spec
    totals = [*case.decode, *(before + new if new else 0 for before, new in case.chunks)]
    qlens = tuple(min(n, 1) for n in case.decode) if case.queries is None else case.queries
    news = [*qlens, *(new for _, new in case.chunks)]
    width = max(1, *(-(-n // size) for n in totals)) + 1  # one column more than anyone needs: padding
    num_pages = sum(-(-n // size) for n in totals) + 3
    free = list(rng.permutation(np.arange(1, num_pages)))
    history_k = np.full((num_pages, size, K, spec.head_dim), leftovers, np.float32)
    history_v = np.full((num_pages, size, K, spec.v_head_dim), leftovers, np.float32) if spec.v_head_dim else None
    tables = np.zeros((len(totals), width), np.int32)
    for row, (total, new) in enumerate(zip(totals, news, strict=True)):
        for column in range(-(-total // size)):
            tables[row, column] = free.pop()
        for position in range(total - new):
            page, slot = tables[row, position // size], position % size
            history_k[page, slot] = rng.standard_normal((K, spec.head_dim))
            if history_v is not None:
                history_v[page, slot] = rng.standard_normal((K, spec.v_head_dim))

    B, Q = len(case.decode), 1 if case.queries is None else max(case.queries)
    before = B * Q  # the chunk part
    starts = np.cumsum([0, *(-(-new // Q_BLOCK) * Q_BLOCK for _, new in case.chunks)]).astype(np.int32)
    C = int(starts[-1]) + case.pad_blocks * Q_BLOCK
    index = np.zeros(before + C, np.int32)
    chunk_row_N = np.full(C // Q_BLOCK, len(case.chunks), np.int32)
    for row, (total, new) in enumerate(zip(totals, news, strict=True)):
        first = row * Q if row < B else before + int(starts[row - B])
        position = np.arange(total - new, total)
        index[first : first + new] = tables[row, position // size] * size + position % size
        if row >= B:
            chunk_row_N[(first - before) // Q_BLOCK : -(-(first - before + new) // Q_BLOCK)] = row - B
    ahead_C = None if case.ahead is None else np.zeros(C, np.int32)
    for (first, end), start in zip(case.ahead or (), starts, strict=False):
        assert ahead_C is not None
        ahead_C[start + first : start + end] = np.arange(end - first)[::-1]
    batch = AttentionBatch(
        kv_index_T=index,  # pyright: ignore[reportArgumentType]
        decode_pages_BP=tables[:B],  # pyright: ignore[reportArgumentType]
        decode_len_B=np.asarray(case.decode, np.int32),  # pyright: ignore[reportArgumentType]
        chunk_pages_RP=tables[B:],  # pyright: ignore[reportArgumentType]
        chunk_start_R=starts[:-1],  # pyright: ignore[reportArgumentType]
        chunk_qlen_R=np.asarray([new for _, new in case.chunks], np.int32),  # pyright: ignore[reportArgumentType]
        chunk_len_R=np.asarray(totals[B:], np.int32),  # pyright: ignore[reportArgumentType]
        chunk_row_N=chunk_row_N,  # pyright: ignore[reportArgumentType]
        decode_qlen_B=None if case.queries is None else np.asarray(qlens, np.int32),  # pyright: ignore[reportArgumentType]
        chunk_ahead_C=ahead_C,  # pyright: ignore[reportArgumentType]
    )
    T = before + C
    return Arguments(
        q_TKGh=rng.standard_normal((T, K, case.group, spec.head_dim)).astype(np.float32),
        k_TKh=rng.standard_normal((T, K, spec.head_dim)).astype(np.float32),
        v_TKh=rng.standard_normal((T, K, spec.v_head_dim)).astype(np.float32) if spec.v_head_dim else None,
        history_k=history_k,
        history_v=history_v,
        batch=batch,
        options={
            "scale": spec.head_dim**-0.5,
            "window": case.window,
            "softcap": case.softcap,
            "sinks_KG": rng.standard_normal((K, case.group)).astype(np.float32) if case.sinks else None,
        },
    )
