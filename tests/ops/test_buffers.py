"""Copies and casts into aligned memory."""

import ml_dtypes
import numpy as np
import pytest

from ops import buffers, native

RNG = np.random.default_rng(0)


@pytest.fixture(params=["native", "numpy"])
def library(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(native, "available", lambda: False)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7), (2, 3, 4)])
def test_empty_is_aligned(shape):
    for dtype in (np.float32, ml_dtypes.bfloat16, np.int8):
        made = buffers.empty(shape, dtype)
        assert (made.shape, made.dtype) == (shape, dtype)
        assert made.flags.c_contiguous
        assert made.flags.writeable
        # Nothing has no address.
        assert not made.size or made.ctypes.data % buffers.ALIGNMENT == 0


def test_lasting_arrays_are_apart(monkeypatch):
    """Small ones beside each other, a large one in memory of its own; with huge pages and without."""
    for huge in (True, False):
        monkeypatch.setattr(buffers, "huge_pages", lambda huge=huge: huge)
        memory = buffers.Lasting()
        made = [
            memory.empty(shape, np.int16) for shape in ((3, 5), (), (0,), (1 << 20,), (8 << 20,), (7,), (15 << 20,))
        ]
        for number, array in enumerate(made):
            array[...] = number
        for number, array in enumerate(made):
            assert (array == number).all() and array.ctypes.data % buffers.ALIGNMENT == 0
            assert array.flags.writeable and array.flags.c_contiguous


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float64])
@pytest.mark.parametrize("target", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.usefixtures("library")
def test_copies_and_casts(source, target):
    values = RNG.standard_normal((6, 40)).astype(source)
    values[0, 0] = 0.0
    for view in (values, values.T, values[:, ::2], values[1:, 3:]):
        out = buffers.empty(view.shape, target)
        buffers.copy(out, view)
        np.testing.assert_array_equal(out.astype(np.float64), view.astype(target).astype(np.float64))
    part = buffers.empty((6, 80), target)
    buffers.copy(part[:, 40:], values)  # into a view
    np.testing.assert_array_equal(part[:, 40:].astype(np.float64), values.astype(target).astype(np.float64))


@pytest.mark.usefixtures("library")
def test_widening_keeps_every_bit_pattern():
    patterns = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    many = np.tile(patterns, 5)  # more than a block
    out = buffers.empty(many.shape, np.float32)
    buffers.copy(out, many)
    np.testing.assert_array_equal(out.view(np.uint32), np.tile(np.arange(1 << 16, dtype=np.uint32) << 16, 5))


def test_owned_copies_what_it_does_not_own():
    mine = buffers.empty((4, 4), np.float32)
    mine[:] = 1
    assert buffers.owned(mine, np.float32) is mine
    frozen = mine.view()
    frozen.flags.writeable = False  # as a mapped file is
    for other in (frozen, mine.T, mine[1:], mine.astype(np.float16)):
        made = buffers.owned(other, np.float32)
        assert not np.shares_memory(made, mine)
        np.testing.assert_array_equal(made, other)
