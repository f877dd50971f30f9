"""The native kernels on chunks longer than the blocks of keys that they take at once, against the reference."""

import dataclasses

import numpy as np
import pytest

from ops import native
from ops.paged_attention.cases import Case, make_arguments
from tests.ops.paged_attention.against_reference import expected, fill, run

BLOCK = 256  # keys; CHUNK_KEYS of ops/native/attention.h
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


@pytest.mark.parametrize("window", [None, 300])
def test_a_row_is_the_same_alone_and_among_others(window, isa):
    """To the last bit: how a context is cut between threads depends on nothing else in the step."""
    lengths = (600, 40, 900, 257, 256, 17)
    case = Case(num_kv_heads=2, group=3, decode=lengths, window=window)
    arguments = make_arguments(case)
    together, _ = run("native", arguments, fill(case, arguments, "bfloat16", "panels"))
    for row in range(len(lengths)):
        alone = np.where(np.arange(len(lengths)) == row, lengths, 0).astype(np.int32)
        batch = dataclasses.replace(arguments.batch, decode_len_B=alone)
        out, _ = run("native", dataclasses.replace(arguments, batch=batch), fill(case, arguments, "bfloat16", "panels"))
        np.testing.assert_array_equal(out[row], together[row])
