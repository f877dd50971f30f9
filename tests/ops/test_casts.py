"""Native casts against numpy and ml_dtypes: every bit pattern, every instruction set."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ops import casts, native

pytestmark = pytest.mark.skipif(not native.available(), reason="no native kernels")
NARROW = [kind for kind in casts.KINDS if kind.itemsize < 4]


@pytest.fixture(params=["generic", "avx2", "avx512"])
def isa(request):
    yield native.set_isa(request.param)
    native.set_isa(None)


def patterns(kind: np.dtype) -> np.ndarray:
    """Every value that the dtype has, five times over and three more: not a whole number of vectors."""
    bits = np.arange(1 << (8 * kind.itemsize), dtype=np.uint8 if kind.itemsize == 1 else np.uint16)
    return np.concatenate([np.tile(bits, 5), bits[:3]]).view(kind)


def same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal, negative zero told from zero, and not numbers in the same places."""
    ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
    np.testing.assert_array_equal(ours, theirs)
    known = ~np.isnan(theirs)
    np.testing.assert_array_equal(np.signbit(ours)[known], np.signbit(theirs)[known])


@pytest.mark.parametrize("target", casts.TARGETS, ids=str)
@pytest.mark.parametrize("kind", NARROW, ids=str)
def test_every_value(kind, target, isa):
    source = patterns(kind)
    out = np.empty(source.shape, target)
    assert casts.cast(out, source)
    with np.errstate(invalid="ignore"):
        same(out, source.astype(np.float32).astype(target))


def test_float32_is_rounded_to_bfloat16(isa):
    rng = np.random.default_rng(0)
    source = rng.integers(0, 1 << 32, 50_003, np.uint32).view(np.float32)
    halfway = np.arange(0x3F808000, 0x3F908000, 1 << 16, np.uint32).view(np.float32)
    source = np.concatenate([source, halfway, np.array([np.inf, -np.inf, np.nan, -0.0, 1e-45], np.float32)])
    out = np.empty(source.shape, ml_dtypes.bfloat16)
    assert casts.cast(out, source)
    with np.errstate(invalid="ignore"):
        same(out, source.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("block", [(1, 1), (1, 100), (7, 5), (4, 64), (128, 128), (1, 33)])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("kind", [np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.int8), np.dtype(np.uint8)], ids=str)
def test_blocks_and_their_scales(kind, zeros, block, isa):
    rng = np.random.default_rng(1)
    source = np.abs(rng.standard_normal((30, 100)) * 20).astype(kind)
    scale = rng.random((-(-30 // block[0]), -(-100 // block[1]))).astype(np.float32)
    zero = np.floor(scale * 16) if zeros else None
    out = np.empty(source.shape, np.float32)
    assert casts.cast_scaled(out, source, scale, *block, zero)
    factor, none = (
        np.repeat(np.repeat(x, block[0], 0)[:30], block[1], 1)[:, :100] for x in (scale, np.floor(scale * 16))
    )
    np.testing.assert_array_equal(out, (source.astype(np.float32) - (none if zeros else 0)) * factor)


def test_what_is_left_to_numpy():
    whole = np.zeros((4, 6), np.float16)
    assert not casts.cast(np.zeros((4, 3), np.float32), whole[:, ::2])
    assert not casts.cast(np.zeros((6, 4), np.float32).T, whole)
    assert not casts.cast(np.zeros((4, 6), np.float16), whole)
    assert not casts.cast(np.zeros((4, 6), np.float32), whole.astype(np.float64))
    assert not casts.cast(np.zeros((4, 1), np.float32), whole)
    with pytest.raises(ValueError, match=r"should be \[2, 1\]"):
        casts.cast_scaled(np.zeros((4, 6), np.float32), whole, np.ones((1, 1), np.float32), 2, 6)
