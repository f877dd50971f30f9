"""The native kernels on chunks longer than the blocks of keys that they take at once, against the reference."""

import dataclasses

import numpy as np
import pytest

from ops import native
from ops.paged_attention.batch import Q_BLOCK, AttentionBatch
from ops.paged_attention.cases import Case, make_arguments
from tests.ops.paged_attention.against_reference import expected, fill, run

BLOCK = 256  # keys; STRETCH of ops/native/attention.h
CASES = {
    # Contexts that end within a panel of 16, on a block's edge and behind it; 5 query heads leave groups of rows unfilled.
    "edges": Case(num_kv_heads=1, group=5, chunks=((250, 290), (BLOCK - 16, 16), (2 * BLOCK - 1, 3))),
    # Whole blocks and panels lie before some rows' windows and not before others' of the same tile.
    "window": Case(num_kv_heads=1, group=2, head_dim=32, chunks=((700, 130), (90, 40)), window=BLOCK + 45),
    "all": Case(num_kv_heads=2, group=3, chunks=((530, 40),), decode=(600,), window=520, softcap=15.0, sinks=True),
}
ATOL = {"float32": 2e-5, "bfloat16": 1.6e-2, "int8": 3e-4}


@pytest.fixture(params=["generic", "avx2", "avx512", "bf16"])
def isa(request):
    """An instruction set, taken for the test; "vnni" has no kernels of its own."""
    if not native.available():
        pytest.skip(native.status())
    if native.set_isa(request.param) != request.param:
        native.set_isa(None)
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    native.set_isa(None)


@pytest.mark.parametrize("dtype", list(ATOL))
@pytest.mark.parametrize("name", list(CASES))
def test_long_chunks(name, dtype, isa):
    arguments = make_arguments(CASES[name])  # leftovers are NaN: whoever lets one in is found out
    out, kv = run("native", arguments, fill(CASES[name], arguments, dtype, "panels"))
    np.testing.assert_allclose(out, expected(arguments, kv), atol=ATOL[dtype])


def test_scores_far_apart(isa):
    """Weights of keys far behind the best are zero, not wrapped around into something large."""
    case = Case(num_kv_heads=1, group=2, head_dim=16, chunks=((0, 300),), decode=(300,))
    arguments = make_arguments(case)
    arguments = dataclasses.replace(arguments, q_TKGh=arguments.q_TKGh * 200)
    out, kv = run("native", arguments, fill(case, arguments, "float32", "panels"))
    want = expected(arguments, kv)
    np.testing.assert_allclose(out, want, atol=5e-4)  # a score of 1,000 is known to 6e-5


@pytest.mark.parametrize("first", range(4))
def test_writes_begin_and_end_anywhere(first):
    """A panel's tokens come from several steps, also one by one, and keep clear of each other."""
    if not native.available():
        pytest.skip(native.status())
    case = Case(num_kv_heads=2, group=1, chunks=((first, 70 + first),), decode=(first + 1, 16 + first))
    arguments = make_arguments(case)
    out, kv = run("native", arguments, fill(case, arguments, "bfloat16", "panels"))
    np.testing.assert_allclose(out, expected(arguments, kv), atol=ATOL["bfloat16"])


LENGTH = 2 * BLOCK + 75
EXACT = {
    "plain": Case(num_kv_heads=2, group=3, head_dim=32, chunks=((0, LENGTH),)),
    "all": Case(num_kv_heads=1, group=5, head_dim=16, chunks=((0, LENGTH),), window=301, softcap=9.0, sinks=True),
}


def one_request(arguments, kv, rows=(), queries=1, piece=None):
    """Attention's output for a request's tokens as decode rows, of each the number of tokens up to its last, or as a piece of a
    prompt (its first token, and past its last), and the pages."""
    table = np.asarray(arguments.batch.chunk_pages_RP)
    first, end = piece or (0, 0)
    at = [np.arange(n - queries, n) for n in rows] + [np.arange(first, end)]
    at = np.concatenate([*at, np.zeros(-(end - first) % Q_BLOCK, np.int64)]).astype(np.int32)
    index = table[0, at // 16] * 16 + at % 16
    index[len(rows) * queries + end - first :] = 0
    R = 1 if piece else 0
    batch = AttentionBatch(
        index,
        np.repeat(table, len(rows), 0),
        np.asarray(rows, np.int32),
        table[:R],
        np.zeros(R, np.int32),
        np.full(R, end - first, np.int32),
        np.full(R, end, np.int32),
        np.zeros(-(-(end - first) // Q_BLOCK), np.int32),
        None if queries == 1 else np.full(len(rows), queries, np.int32),
    )
    given = {name: getattr(arguments, name)[at] for name in ("q_TKGh", "k_TKh", "v_TKh")}
    out, kv = run("native", dataclasses.replace(arguments, batch=batch, **given), kv)
    return out[: len(rows) * queries + end - first], kv


@pytest.mark.parametrize("dtype", list(ATOL))
@pytest.mark.parametrize("name", list(EXACT))
def test_a_token_is_the_same_whichever_way_it_is_computed(name, dtype, isa):
    """To the last bit: in a prompt at once, in pieces, behind a prefix that is there, in decode, among tokens to be verified."""
    arguments = make_arguments(EXACT[name])
    whole, kv = one_request(arguments, fill(EXACT[name], arguments, dtype, "panels"), piece=(0, LENGTH))
    ends = (7, BLOCK, BLOCK + 1, 2 * BLOCK - 3, LENGTH)
    alone, kv = one_request(arguments, kv, rows=ends)
    np.testing.assert_array_equal(alone, whole[np.asarray(ends) - 1])
    verified, kv = one_request(arguments, kv, rows=ends, queries=5)
    np.testing.assert_array_equal(
        verified.reshape(len(ends), 5, -1), np.stack([whole[n - 5 : n] for n in ends]).reshape(len(ends), 5, -1)
    )
    kv = fill(EXACT[name], arguments, dtype, "panels")
    for piece in ((0, 64), (64, 307), (307, 320), (320, LENGTH)):
        part, kv = one_request(arguments, kv, piece=piece)
        np.testing.assert_array_equal(part, whole[slice(*piece)])


@pytest.mark.parametrize("window,dtype,page_size", [(None, "bfloat16", 16), (300, "int8", 32)])
def test_a_row_is_the_same_alone_and_among_others(window, dtype, page_size, isa):
    """To the last bit: how a context is cut between threads depends on nothing else in the step."""
    lengths = (600, 40, 900, 257, 256, 17)
    case = Case(num_kv_heads=2, group=3, decode=lengths, window=window, page_size=page_size)
    arguments = make_arguments(case)
    together, _ = run("native", arguments, fill(case, arguments, dtype, "panels"))
    for row in range(len(lengths)):
        alone = np.where(np.arange(len(lengths)) == row, lengths, 0).astype(np.int32)
        batch = dataclasses.replace(arguments.batch, decode_len_B=alone)
        out, _ = run("native", dataclasses.replace(arguments, batch=batch), fill(case, arguments, dtype, "panels"))
        np.testing.assert_array_equal(out[row], together[row])
